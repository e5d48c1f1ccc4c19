"""What a run takes from its step's time: hours, price and energy for so many tokens, and the share of the peak used."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from brim.hardware import Device
from brim.hardware.catalogue import Accelerator
from brim.models.spec import ModelSpec
from brim.recipe import Recipe
from brim.speed.roofline import step_work

Range = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    tokens: int
    hours: float
    hours_range: Range | None
    price_usd: float | None
    """Of as many hours of each device, as its price was seen once; None where none is known."""
    energy_kwh: float | None
    """At the board's power limit, the rest of the machine not counted; None where it is unknown."""
    utilization: float
    """FLOPs that the model needs (nothing recomputed) over what the device could do by its maker's peak; on a
    processor, over what it was measured to achieve."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cost(
    spec: ModelSpec,
    recipe: Recipe,
    device: Device,
    *,
    tokens: int,
    step_time_s: float,
    step_time_range_s: Range | None = None,
    row: Accelerator | None = None,
) -> Cost:
    """Of reading `tokens` with steps of this time; `row` knows price, power and peak of the device."""
    steps = tokens / recipe.tokens_per_step
    hours = steps * step_time_s / 3600
    power_w, price = (row.power_w, row.price_usd_per_hour) if row else (None, None)
    devices = recipe.parallel.devices
    return Cost(
        tokens=tokens,
        hours=hours,
        hours_range=None if step_time_range_s is None else _times(step_time_range_s, steps / 3600),
        price_usd=None if price is None else devices * hours * price,
        energy_kwh=None if power_w is None else devices * hours * power_w / 1000,
        utilization=utilization(spec, recipe, device, step_time_s=step_time_s, row=row),
    )


def utilization(
    spec: ModelSpec, recipe: Recipe, device: Device, *, step_time_s: float, row: Accelerator | None = None
) -> float:
    """Share of the peak in the recipe's compute format, recomputation not counted as work."""
    kept = replace(recipe, memory=replace(recipe.memory, activation_checkpointing="none"))
    work = step_work(spec, kept)
    peak = (row.peak_flops.get(work.compute) if row else None) or device.flops[work.compute]
    return work.flops / (step_time_s * peak)


def _times(span: Range, factor: float) -> Range:
    return span[0] * factor, span[1] * factor
