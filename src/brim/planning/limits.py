"""How far hardware reaches, and how little a job takes: the longest row, the largest batch, the smallest devices.

By closed form, under the same constraints as a plan and with its upper bounds, so that what is named will fit. Pure.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from brim.errors import UsageError
from brim.hardware.device import Device
from brim.models.spec import ModelSpec
from brim.planning.candidates import candidates_of
from brim.planning.constraints import Constraints, num_positions
from brim.planning.estimate import estimate, upper_bound
from brim.planning.offers import Offer
from brim.recipe import Recipe
from brim.report import Prediction

COUNTS = (1, 2, 4, 8)
"""Devices of one machine that are tried for the smallest."""
_STEP = 64
"""Tokens: rows are told to the nearest below."""
_LONGEST = 2**20
_MOST_ROWS = 2**12


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Each by its lightest recipe; None where nothing fits, or where the constraints decide it."""

    longest_row: Prediction | None
    """One row at a time."""
    largest_batch: Prediction | None
    """Of rows as long as the plan's."""
    smallest: Mapping[int, Prediction]
    """Number of devices -> the device with the least memory that holds the job."""

    def to_dict(self) -> dict[str, Any]:
        longest, largest = self.longest_row, self.largest_batch
        return {
            "longest_row": None if longest is None else longest.to_dict(),
            "largest_batch": None if largest is None else largest.to_dict(),
            "smallest": {str(count): prediction.to_dict() for count, prediction in self.smallest.items()},
        }


def limits(
    spec: ModelSpec, device: Device, constraints: Constraints, *, budget_bytes: int, devices: Iterable[Device]
) -> Limits:
    """Of this device for the longest row and the largest batch; of `devices` for the smallest."""
    alone = replace(constraints, global_batch_size=None)
    reach = min(num_positions(spec) or _LONGEST, _LONGEST)

    def rows(number: int) -> Prediction | None:
        return _fitting(spec, device, _pinned(alone, micro_batch_size=number), budget_bytes)

    def tokens(number: int) -> Prediction | None:
        longer = replace(_pinned(alone, micro_batch_size=1), seq_len=_STEP * number)
        return _fitting(spec, device, longer, budget_bytes)

    return Limits(
        longest_row=None if "seq_len" in constraints.pinned else _largest(tokens, reach // _STEP),
        largest_batch=None if "micro_batch_size" in constraints.pinned else _largest(rows, _MOST_ROWS),
        smallest=_smallest(spec, constraints, sorted(devices, key=lambda each: (each.memory_bytes, each.name))),
    )


def _largest(fitting: Callable[[int], Prediction | None], most: int) -> Prediction | None:
    """The answer for the largest number up to `most` that has one; a larger number needs more memory."""
    low, high, found = 0, most + 1, None
    while high - low > 1:
        middle = (low + high) // 2
        if (answer := fitting(middle)) is None:
            high = middle
        else:
            low, found = middle, answer
    return found


def _smallest(spec: ModelSpec, constraints: Constraints, ascending: Sequence[Device]) -> dict[int, Prediction]:
    """A recipe's tensors are the same on all devices, so the lightest on one is the lightest on each."""
    found: dict[int, Prediction] = {}
    for count in COUNTS:
        spread = replace(constraints, devices_per_node=count, nodes=1)
        lightest = _lightest(spec, ascending[-1], spread)
        if lightest is None:
            continue
        recipe = Recipe.from_dict(lightest.recipe)
        for device in ascending:
            prediction = estimate(spec, recipe, device=device, budget_bytes=device.memory_bytes)
            if prediction.fits:
                found[count] = prediction
                break
    return found


def _fitting(spec: ModelSpec, device: Device, constraints: Constraints, budget_bytes: int) -> Prediction | None:
    lightest = _lightest(spec, device, constraints)
    if lightest is None or upper_bound(lightest) > budget_bytes:
        return None
    return replace(lightest, budget_bytes=budget_bytes)


def _lightest(spec: ModelSpec, device: Device, constraints: Constraints) -> Prediction | None:
    """None where no recipe goes with the constraints: more devices than rows, say. The host's memory is not asked."""
    counts = {"devices_per_node": constraints.devices_per_node, "nodes": constraints.nodes}
    offer = Offer(device=device, budget_bytes=device.memory_bytes, **counts)
    try:
        found = candidates_of(spec, offer, replace(constraints.on(device, **counts), may_offload=False))
    except UsageError:
        return None
    lightest = min(found, key=lambda c: (c.peak_bytes * (1 + c.kind.band[1]), -c.tokens_per_s))
    return estimate(spec, lightest.recipe, device=device, budget_bytes=device.memory_bytes)


def _pinned(constraints: Constraints, **settings: int) -> Constraints:
    return replace(
        constraints, settings=(*constraints.settings, *(f"{key}={value}" for key, value in settings.items()))
    )
