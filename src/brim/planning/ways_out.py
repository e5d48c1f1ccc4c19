"""Nothing fits: the lightest recipe there is, and what would make it fit, each way with its number."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from brim.errors import DoesNotFitError, UsageError
from brim.models.spec import ModelSpec
from brim.planning.candidates import candidates_of
from brim.planning.constraints import Constraints
from brim.planning.estimate import upper_bound
from brim.planning.offers import Offer
from brim.planning.ranking import Candidate
from brim.report import Plan, Prediction
from brim.units import format_bytes, format_count

_SHORTEST_SEQ_LEN = 16
_MOST_GPUS = 8
"""In one machine."""


class NothingFitsError(DoesNotFitError):
    """No candidate fits. `plan.recipes[0]` is the lightest there is, rehearsed."""

    def __init__(self, message: str, plan: Plan) -> None:
        super().__init__(message)
        self.plan = plan


def refusal(spec: ModelSpec, offer: Offer, constraints: Constraints, lightest: Prediction) -> str:
    """What the user reads."""
    missing = upper_bound(lightest) - lightest.budget_bytes
    ways = "; ".join(ways_out(spec, offer, constraints, lightest))
    return (
        f"{spec.name}: nothing fits {format_bytes(lightest.budget_bytes)} on {offer.name}; the lightest recipe "
        f"({summary(lightest)}) needs {format_bytes(upper_bound(lightest))}, {format_bytes(missing)} more. "
        f"Ways out: {ways}"
    )


def ways_out(spec: ModelSpec, offer: Offer, constraints: Constraints, lightest: Prediction) -> list[str]:
    """At least three."""
    ways = [f"--memory {-(-upper_bound(lightest) // 2**20)}MiB, if the machine has it"]
    ways += _lighter_method(spec, offer, constraints)
    ways += _more_devices(spec, offer, constraints)
    length = int(lightest.recipe["seq_len"]) // 2
    while "seq_len" not in constraints.pinned and length >= _SHORTEST_SEQ_LEN:
        if any(c.fits for c in _all(spec, offer, replace(constraints, seq_len=length))):
            ways.append(f"--seq-len {length}")
            break
        length //= 2
    if len(ways) < 3:
        share = lightest.budget_bytes / upper_bound(lightest)
        ways.append(f"a model of about {format_count(float(f'{share * spec.num_parameters:.2g}'))} parameters")
    if len(ways) < 3:
        ways.append("another --gpu: --limits names the smallest that holds this job")
    return ways


def _lighter_method(spec: ModelSpec, offer: Offer, constraints: Constraints) -> list[str]:
    lighter: dict[str, tuple[Literal["lora", "qlora"], ...]] = {"full": ("lora", "qlora"), "lora": ("qlora",)}
    if {"method", "precision.weights"} & constraints.pinned:
        return []
    for method in lighter.get(constraints.method, ()):
        others = _all(spec, offer, replace(constraints, method=method))
        if any(c.fits for c in others):
            return [f"--method {method} (from about {format_bytes(min(c.peak_bytes for c in others))} on)"]
    return []


def _more_devices(spec: ModelSpec, offer: Offer, constraints: Constraints) -> list[str]:
    """The fewest GPUs, twice as many at a time, among which the job can be divided."""
    count, rows = offer.devices_per_node, constraints.global_batch_size
    if offer.device.kind == "cpu" or any(key.startswith("parallel.") for key in constraints.pinned):
        return []
    while (count := 2 * count) <= _MOST_GPUS and (rows is None or rows % (count * offer.nodes) == 0):
        others = _all(spec, replace(offer, devices_per_node=count), constraints)
        if any(c.fits for c in others):
            return [f"--gpus {count} (about {format_bytes(min(c.peak_bytes for c in others))} on each)"]
    return []


def _all(spec: ModelSpec, offer: Offer, constraints: Constraints) -> list[Candidate]:
    """Empty where the constraints leave none."""
    on = constraints.on(offer.device, devices_per_node=offer.devices_per_node, nodes=offer.nodes)
    try:
        return candidates_of(spec, offer, on)
    except UsageError:
        return []


def summary(prediction: Prediction) -> str:
    """`lora, bf16, 4 x 1024 tokens, checkpointing full, loss chunked`."""
    recipe = prediction.recipe
    memory = recipe["memory"]
    return (
        f"{recipe['method']}, {recipe['precision']['weights']}{stepped(recipe)}, "
        f"{recipe['micro_batch_size']} x {recipe['seq_len']} tokens, "
        f"checkpointing {memory['activation_checkpointing']}, loss {memory['loss']}"
    )


def stepped(recipe: Mapping[str, Any]) -> str:
    """`, 8-bit states, optimizer on the host`: how weights are updated where it is not AdamW on the device."""
    optimizer = recipe["optimizer"]
    names = {"adamw": "", "adamw8bit": ", 8-bit states"}
    in_backward = ", stepped in backward" if optimizer["in_backward"] else ""
    offload = recipe["memory"]["offload"]
    hosts = {"none": "", "all": ", weights and activations on the host"}
    host = hosts.get(offload, f", {offload} on the host")
    return names.get(optimizer["name"], f", {optimizer['name']}") + in_backward + host
