"""What a run over so many tokens takes: hours, price and energy."""

from collections.abc import Mapping

from brim import units
from brim.cli import console
from brim.hardware import Device
from brim.hardware.catalogue import lookup
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.report import Plan, Prediction
from brim.speed.cost import Cost, cost

_SHOWN = 3


def of(spec: ModelSpec, recipe: Recipe, device: Device, prediction: Prediction, tokens: int) -> Cost:
    return cost(
        spec,
        recipe,
        device,
        tokens=tokens,
        step_time_s=prediction.step_time_s,
        step_time_range_s=prediction.step_time_range_s,
        row=lookup(device.name),
    )


def of_best(spec: ModelSpec, result: Plan, tokens: int | None, devices: Mapping[str, Device]) -> list[Cost]:
    """Of the first recipes that fit, finalists where there are any; none where no tokens were asked for."""
    if tokens is None:
        return []
    best = [p for p in result.recipes[:_SHOWN] if p.fits and p.method == result.recipes[0].method]
    return [of(spec, Recipe.from_dict(p.recipe), devices[p.device_name], p, tokens) for p in best]


def show(taken: Cost) -> None:
    console.out.print(line(taken), markup=False, soft_wrap=True)


def line(taken: Cost) -> str:
    hours = f"{units.format_count(taken.tokens)} tokens: {units.format_duration(3600 * taken.hours)}"
    if taken.hours_range is not None:
        hours += " ({} to {})".format(*(units.format_duration(3600 * end) for end in taken.hours_range))
    price = "price not known" if taken.price_usd is None else f"${taken.price_usd:,.2f}"
    energy = "" if taken.energy_kwh is None else f", {taken.energy_kwh:,.1f} kWh at the power limit"
    return f"{hours}, {price}{energy}; {taken.utilization:.0%} of the peak used"
