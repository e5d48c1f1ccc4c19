"""`brim predict`: the ledger of exactly one recipe."""

from typing import Annotated

import typer
from rich.table import Table

from brim import units
from brim.cli import console, options, picture
from brim.hardware import Device
from brim.memory.bands import DEFAULT_RISK
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.report import Prediction
from brim.speed.bands import CPU_ROOFLINE


def command(
    source: options.Source,
    device: options.DeviceName = "cpu",
    gpu: options.GpuName = None,
    risk: options.Risk = DEFAULT_RISK,
    memory: options.Memory = None,
    method: options.Method = None,
    seq_len: options.SeqLen = None,
    micro_batch_size: options.MicroBatchSize = None,
    settings: options.Settings = None,
    quick: Annotated[bool, typer.Option("--quick", help="Closed form instead of a rehearsal: no torch.")] = False,
    plot: picture.Plot = None,
    json: options.Json = False,
) -> int:
    """Peak memory of one recipe, by owner."""
    picture.check(plot)
    recipe, spec = options.recipe_of(
        source, method=method, seq_len=seq_len, micro_batch_size=micro_batch_size, settings=settings
    )
    cap = None if memory is None else units.parse_bytes(memory)
    found = options.device_of(device, gpu, cap, quick=quick)
    budget = options.budget_of(found, cap)
    prediction = _estimated(spec, recipe, found, budget) if quick else _rehearsed(spec, recipe, found, budget, risk)
    picture.draw(
        plot,
        title=f"{prediction.model} on {prediction.device_name}",
        bars={"predicted": prediction.ledger},
        budget_bytes=None if cap is None else prediction.budget_bytes,
    )
    if json:
        console.print_json(prediction.to_dict())
    else:
        show(prediction)
    return 0


def _estimated(spec: ModelSpec, recipe: Recipe, device: Device, budget_bytes: int) -> Prediction:
    from brim.planning.estimate import estimate

    return estimate(spec, recipe, device=device, budget_bytes=budget_bytes)


def _rehearsed(spec: ModelSpec, recipe: Recipe, device: Device, budget_bytes: int, risk: float) -> Prediction:
    from brim.rehearsal import rehearse

    return rehearse(spec, recipe, device=device, budget_bytes=budget_bytes, risk=risk)


def show(prediction: Prediction) -> None:
    """The ledger as a table, largest line first, and what it means."""
    table = Table(title=f"{prediction.model} on {prediction.device_name}", title_justify="left")
    table.add_column("owner")
    table.add_column("at the peak", justify="right")
    table.add_column("share", justify="right")
    total = prediction.ledger.total
    for line, nbytes in sorted(prediction.ledger.to_dict().items(), key=lambda item: -item[1]):
        if nbytes:
            table.add_row(line, units.format_bytes(nbytes), f"{100 * nbytes / total:.1f} %")
    table.add_section()
    for name, peak in prediction.peak.to_dict().items():
        if peak is not None:
            table.add_row(f"peak {name.removesuffix('_bytes')}", units.format_bytes(peak), f"{peak:,} B")
    console.out.print(table)
    if prediction.peak.device_bytes is not None:
        low, high = (prediction.peak.highest_bytes * (1 + end) for end in prediction.error_band)
        console.out.print(
            f"between {units.format_bytes(int(low))} and {units.format_bytes(int(high))}, as published runs went"
        )
    fits = "fits" if prediction.fits else "does not fit"
    console.out.print(
        f"{fits} in {units.format_bytes(prediction.budget_bytes)}; "
        f"about {units.format_duration(prediction.step_time_s)} a step{_time_range(prediction)}, "
        f"{units.format_count(prediction.tokens_per_s)} tokens/s ({prediction.method})"
    )
    if prediction.step_time_basis == CPU_ROOFLINE:
        console.note("the step's time is rough: brim doctor --calibrate measures what this machine achieves")
    for reason in prediction.reasons:
        console.note(reason)


def _time_range(prediction: Prediction) -> str:
    if prediction.step_time_range_s is None:
        return ""
    low, high = map(units.format_duration, prediction.step_time_range_s)
    return f" ({low} to {high})"
