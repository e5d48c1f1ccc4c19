"""Nothing fits: the lightest recipe there is, and what would make it fit, each way with its number."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from brim.errors import DoesNotFitError
from brim.models.spec import ModelSpec
from brim.planning.constraints import Constraints, value_of
from brim.planning.estimate import upper_bound
from brim.planning.offers import Offer
from brim.planning.scale import Scale, considered
from brim.recipe import Recipe
from brim.report import Plan, Prediction
from brim.units import format_bytes, format_count

_TOKENS = 16
"""Rows are offered in multiples of it."""
_MOST_GPUS = 8
"""In one machine."""
_LIGHTER = {
    "optimizer.name": ("adamw8bit", "adafactor"),
    "precision.master": ("none",),
    "precision.weights": ("bf16", "int8", "nf4"),
    "memory.activation_checkpointing": ("selective", "full"),
    "memory.loss": ("chunked",),
    "memory.offload": ("optimizer", "all"),
    "micro_batch_size": (1,),
}
"""Values that need less, the mildest first."""


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
    ways += _shorter_rows(spec, offer, constraints)
    ways += _other_pins(spec, offer, constraints, lightest)
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
        if found := _fitting(spec, offer, replace(constraints, method=method)):
            return [f"--method {method} (about {format_bytes(found.peak.highest_bytes)})"]
    return []


def _more_devices(spec: ModelSpec, offer: Offer, constraints: Constraints) -> list[str]:
    """The fewest GPUs, one more at a time, among which the job can be divided."""
    rows = constraints.global_batch_size
    if offer.device.kind == "cpu" or any(key.startswith("parallel.") for key in constraints.pinned):
        return []
    for count in range(offer.devices_per_node + 1, _MOST_GPUS + 1):
        divides = rows is None or rows % (count * offer.nodes) == 0
        if divides and (found := _fitting(spec, replace(offer, devices_per_node=count), constraints)):
            return [f"--gpus {count} (about {format_bytes(found.peak.highest_bytes)} on each)"]
    return []


def _shorter_rows(spec: ModelSpec, offer: Offer, constraints: Constraints) -> list[str]:
    """The longest that fit."""
    recipes = [] if "seq_len" in constraints.pinned else _considered(spec, offer, constraints)
    if not recipes:
        return []
    found = Scale(spec, offer.device).largest(
        recipes,
        lambda recipe, number: replace(recipe, seq_len=_TOKENS * number),
        most=recipes[0].seq_len // _TOKENS,
        budget_bytes=offer.budget_bytes,
    )
    return [] if found is None else [f"--seq-len {_TOKENS * found[0]}"]


def _other_pins(spec: ModelSpec, offer: Offer, constraints: Constraints, lightest: Prediction) -> list[str]:
    """For each key that the user decided, a lighter value that would do."""
    ways = []
    for key, values in _LIGHTER.items():
        if key not in constraints.pinned:
            continue
        for value in values:
            pins = [pin for pin in constraints.settings if pin.partition("=")[0].strip() != key]
            if found := _fitting(spec, offer, replace(constraints, settings=(*pins, f"{key}={value}"))):
                pinned = value_of(Recipe.from_dict(lightest.recipe), key)
                ways.append(f"{key} = {value} for {pinned} (about {format_bytes(found.peak.highest_bytes)})")
                break
    return ways


def _fitting(spec: ModelSpec, offer: Offer, constraints: Constraints) -> Prediction | None:
    """The lightest recipe, where that is sure to fit."""
    if not (recipes := _considered(spec, offer, constraints)):
        return None
    scale = Scale(spec, offer.device)
    found = scale.prediction(scale.lightest(recipes), offer.budget_bytes)
    return found if found.fits else None


def _considered(spec: ModelSpec, offer: Offer, constraints: Constraints) -> list[Recipe]:
    on = constraints.on(offer.device, devices_per_node=offer.devices_per_node, nodes=offer.nodes)
    return considered(spec, offer.device, on)


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
