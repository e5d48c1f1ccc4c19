"""How a recipe's peak grows: with longer rows, more of them, a higher rank, more devices. By closed form. Pure."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from brim.errors import RecipeError
from brim.hardware.device import Device
from brim.memory.bands import DEFAULT_RISK
from brim.models.spec import ModelSpec
from brim.planning.estimate import estimate
from brim.recipe import Recipe
from brim.report import Prediction

_LONGEST = 2**17
_MOST_ROWS = 512
_HIGHEST_RANK = 512
_COUNTS = (1, 2, 3, 4, 6, 8, 16, 32, 64)
_IN_A_NODE = 8
_STEPS_PER_DOUBLING = 3
SHOWN = 1.7
"""Times the budget, or the recipe's own peak where that is higher: a curve ends beyond it."""

Settings = Callable[[int], Iterable[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A recipe's predictions as one number of it changes, the rest as it is."""

    name: str
    """`tokens of a row`."""
    points: tuple[tuple[int, Prediction], ...]
    """Values, ascending, and the prediction at each."""
    now: int
    """The recipe's own value; it is among them."""

    @property
    def fitting(self) -> tuple[int, ...]:
        """Values whose upper bound is within the budget."""
        return tuple(value for value, prediction in self.points if prediction.fits)


def curves(
    spec: ModelSpec, recipe: Recipe, *, device: Device, budget_bytes: int, risk: float = DEFAULT_RISK
) -> tuple[Curve, ...]:
    """Of all that goes with the recipe, the model and the device."""

    own = estimate(spec, recipe, device=device, budget_bytes=budget_bytes, risk=risk)
    most_bytes = SHOWN * max(budget_bytes, own.peak.highest_bytes)

    def curve(name: str, values: Iterable[int], now: int, settings: Settings) -> Curve:
        points = []
        for value in sorted({*values, now}):
            try:
                changed = recipe.with_settings(settings(value)) if value != now else recipe
            except RecipeError:
                continue
            found = estimate(spec, changed, device=device, budget_bytes=budget_bytes, risk=risk)
            points.append((value, found))
            if value > now and found.peak.highest_bytes > most_bytes:
                break
        return Curve(name=name, points=tuple(points), now=now)

    found = [
        curve("tokens of a row", _lengths(spec), recipe.seq_len, lambda value: (f"seq_len={value}",)),
        curve(
            "rows of a micro-batch",
            _doublings(1, _MOST_ROWS),
            recipe.micro_batch_size,
            lambda value: (f"micro_batch_size={value}",),
        ),
    ]
    if recipe.adapts:
        ranks = _doublings(1, _HIGHEST_RANK)
        found.append(curve("rank of the adapters", ranks, recipe.lora.rank, lambda value: (f"lora.rank={value}",)))
    if device.kind != "cpu":
        alone = recipe.parallel.devices == 1 and (recipe.memory.offload != "none" or recipe.optimizer.in_backward)
        name = "GPUs; of several, nothing offloaded, stepped after backward" if alone else "GPUs"
        found.append(curve(name, _COUNTS, recipe.parallel.devices, lambda value: _spread(recipe, value)))
    return tuple(one for one in found if len(one.points) > 1)


def _spread(recipe: Recipe, count: int) -> Iterator[str]:
    """Everything shared among them, unless the recipe says what is; those that share matrices stay as many.

    What only one device can do is left.
    """
    if count > 1:
        yield from ("memory.offload=none", "optimizer.in_backward=false")
    sharding = recipe.parallel.sharding if recipe.parallel.sharding != "none" else "zero3"
    yield f"parallel.devices_per_node={min(count, _IN_A_NODE)}"
    yield f"parallel.nodes={max(1, count // _IN_A_NODE)}"
    yield f"parallel.sharding={sharding if count > recipe.parallel.tensor else 'none'}"


def _lengths(spec: ModelSpec) -> Iterator[int]:
    """Multiples of 64 as far as the model has positions."""
    most = min(spec.num_positions or _LONGEST, _LONGEST)
    return (64 * count for count in _doublings(1, most // 64))


def _doublings(least: int, most: int) -> list[int]:
    """Whole numbers in equal ratios."""
    found, value = {most}, float(least)
    while value < most:
        found.add(round(value))
        value *= 2 ** (1 / _STEPS_PER_DOUBLING)
    return sorted(found)
