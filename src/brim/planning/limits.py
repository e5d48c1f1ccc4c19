"""How far hardware reaches, and how little a job takes: the longest row, the largest batch and model, the smallest
devices.

By closed form, under the same constraints as a plan and with its upper bounds, so that what is named will fit. Pure.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from brim.hardware.device import Device
from brim.memory.bands import DEFAULT_RISK
from brim.models.spec import ModelSpec
from brim.planning.constraints import Constraints
from brim.planning.estimate import estimate
from brim.planning.scale import Scale, considered
from brim.recipe import Recipe
from brim.report import Prediction

COUNTS = (1, 2, 4, 8)
"""Devices of one machine that are tried for the smallest."""
_STEP = 64
"""Tokens: rows are told to the nearest below."""
_LONGEST = 2**20
_MOST_ROWS = 2**12
_LEAST_BITS = 4
"""Of a parameter, in the smallest format that a base is held in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Each by its lightest recipe; None where nothing fits, or where the constraints decide it."""

    longest_row: Prediction | None
    """One row at a time."""
    largest_batch: Prediction | None
    """Of rows as long as the plan's."""
    largest_model: Prediction | None
    """One row at a time, as long as the plan's where the model has the positions."""
    smallest: Mapping[int, Prediction]
    """Number of devices -> the device with the least memory that holds the job."""

    def to_dict(self) -> dict[str, Any]:
        named = {
            "longest_row": self.longest_row,
            "largest_batch": self.largest_batch,
            "largest_model": self.largest_model,
        }
        return {
            **{name: None if found is None else found.to_dict() for name, found in named.items()},
            "smallest": {str(count): prediction.to_dict() for count, prediction in self.smallest.items()},
        }


def limits(
    spec: ModelSpec,
    device: Device,
    constraints: Constraints,
    *,
    budget_bytes: int,
    devices: Iterable[Device],
    models: Iterable[ModelSpec] = (),
    risk: float = DEFAULT_RISK,
) -> Limits:
    """Of this device for the longest row and the largest batch; of `models` the largest, of `devices` the smallest."""
    alone = replace(constraints, global_batch_size=None)
    reach = min(spec.num_positions or _LONGEST, _LONGEST)
    scale = Scale(spec, device, risk)

    def rows(recipe: Recipe, number: int) -> Recipe:
        return replace(recipe, micro_batch_size=number)

    def tokens(recipe: Recipe, number: int) -> Recipe:
        return replace(recipe, micro_batch_size=1, seq_len=_STEP * number)

    def largest(key: str, changed: Callable[[Recipe, int], Recipe], most: int) -> Prediction | None:
        if key in constraints.pinned:
            return None
        recipes = considered(spec, device, _on(device, alone))
        found = scale.largest(recipes, changed, most=most, budget_bytes=budget_bytes)
        return None if found is None else scale.prediction(found[1], budget_bytes)

    return Limits(
        longest_row=largest("seq_len", tokens, reach // _STEP),
        largest_batch=largest("micro_batch_size", rows, _MOST_ROWS),
        largest_model=_largest_model(models, device, alone, budget_bytes, risk),
        smallest=_smallest(spec, constraints, sorted(devices, key=lambda each: (each.memory_bytes, each.name)), risk),
    )


def _on(device: Device, constraints: Constraints) -> Constraints:
    """Without the host, whose memory is not asked."""
    on = constraints.on(device, devices_per_node=constraints.devices_per_node, nodes=constraints.nodes)
    return replace(on, may_offload=False)


def _largest_model(
    models: Iterable[ModelSpec], device: Device, constraints: Constraints, budget_bytes: int, risk: float
) -> Prediction | None:
    all_bytes = budget_bytes * constraints.devices_per_node * constraints.nodes
    for spec in sorted(models, key=lambda each: -each.num_parameters):
        if spec.num_parameters * _LEAST_BITS // 8 > all_bytes:
            continue
        shorter = replace(constraints, seq_len=_known_length(spec, constraints))
        if recipes := considered(spec, device, _on(device, shorter)):
            scale = Scale(spec, device, risk)
            lightest = scale.prediction(scale.lightest(recipes), budget_bytes)
            if lightest.fits:
                return lightest
    return None


def _known_length(spec: ModelSpec, constraints: Constraints) -> int | None:
    positions = spec.num_positions
    return constraints.seq_len and min(constraints.seq_len, positions or constraints.seq_len)


def _smallest(
    spec: ModelSpec, constraints: Constraints, ascending: Sequence[Device], risk: float
) -> dict[int, Prediction]:
    """A recipe's tensors are the same on all devices, so the lightest on one is the lightest on each."""
    found: dict[int, Prediction] = {}
    for count in COUNTS:
        spread = replace(constraints, devices_per_node=count, nodes=1)
        recipes = considered(spec, ascending[-1], _on(ascending[-1], spread))
        if not recipes:
            continue
        recipe = Scale(spec, ascending[-1], risk).lightest(recipes)
        for device in ascending:
            prediction = estimate(spec, recipe, device=device, budget_bytes=device.memory_bytes, risk=risk)
            if prediction.fits:
                found[count] = prediction
                break
    return found
