"""`brim predict`: the ledger of exactly one recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from brim import units
from brim.cli import advice, console, costs, modules, options, picture
from brim.cli.answered import rehearsed
from brim.errors import UsageError
from brim.hardware import Device
from brim.memory.bands import DEFAULT_RISK
from brim.models import ModelSpec
from brim.recipe import Recipe, Writing
from brim.report import Advice, ModuleRow, Prediction
from brim.speed.bands import CPU_ROOFLINE
from brim.speed.cost import Cost

if TYPE_CHECKING:
    from brim.memory.trace import Trace


Inference = Annotated[
    bool, typer.Option("--inference", help="Of reading --batch rows of --context tokens and writing on.")
]
Snapshot = Annotated[
    Path | None, typer.Option(metavar="FILE.pickle", help="Write what PyTorch's memory_viz page opens.")
]
Asked = Annotated[bool, typer.Option("--advice", help="What would save most: each lever pulled alone, and predicted.")]

Modules = Annotated[bool, typer.Option("--modules", help="Which module holds the bytes of the peak.")]


def command(
    source: options.Source,
    device: options.DeviceName = "cpu",
    gpu: options.GpuName = None,
    risk: options.Risk = DEFAULT_RISK,
    memory: options.Memory = None,
    method: options.Method = None,
    seq_len: options.SeqLen = None,
    micro_batch_size: options.MicroBatchSize = None,
    gpus: options.Gpus = None,
    nodes: options.Nodes = None,
    sharding: options.Sharding = None,
    tensor: options.Tensor = None,
    settings: options.Settings = None,
    inference: Inference = False,
    new_tokens: Annotated[int, typer.Option(min=1, help="With --inference: tokens written after each row.")] = 128,
    quick: Annotated[bool, typer.Option("--quick", help="Closed form instead of a rehearsal: no torch.")] = False,
    tokens: options.Tokens = None,
    plot: picture.Plot = None,
    snapshot: Snapshot = None,
    asked: Asked = False,
    by_module: Modules = False,
    anew: options.Anew = False,
    json: options.Json = False,
) -> int:
    """Peak memory of one recipe, by owner."""
    picture.check(plot)
    _check(quick=quick, inference=inference, snapshot=snapshot, asked=asked, by_module=by_module)
    written = new_tokens if inference else None
    spread = options.spread(gpus=gpus, nodes=nodes, sharding=sharding, tensor=tensor)
    recipe, spec = options.recipe_of(
        source,
        method=method,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        settings=[*spread, *(settings or [])],
        new_tokens=written or 0,
    )
    num_tokens = None if tokens is None else units.parse_count(tokens, what="--tokens")
    cap = None if memory is None else units.parse_bytes(memory)
    found = options.device_of(device, gpu, cap, quick=quick)
    budget = options.budget_of(found, cap, recipe)
    if quick:
        prediction = _estimated(spec, recipe, found, budget)
    else:
        prediction = rehearsed(spec, recipe, found, budget, risk, new_tokens=written, anew=anew)
    trace = None
    if not quick and (plot is not None or snapshot is not None):
        trace = _trace(spec, recipe, found, snapshot, new_tokens=written)
    _draw(plot, prediction, trace, budget_bytes=None if cap is None else prediction.budget_bytes)
    taken = None if num_tokens is None else costs.of(spec, recipe, found, prediction, num_tokens)
    is_advised = asked or not (prediction.fits or inference)
    given = advice.of(spec, recipe, prediction, found, risk, is_short=not asked, anew=anew) if is_advised else None
    rows = _by_module(spec, recipe, found) if by_module else None
    if json:
        _print_json(prediction, taken, given, rows)
    else:
        _print(prediction, taken, given, rows, asked=asked)
    return 0


def _print(
    prediction: Prediction,
    taken: Cost | None,
    given: Sequence[Advice] | None,
    rows: Sequence[ModuleRow] | None,
    *,
    asked: bool,
) -> None:
    show(prediction)
    if taken is not None:
        costs.show(taken)
    if rows is not None:
        modules.show(rows)
    if given is not None:
        advice.show(prediction, given, is_short=not asked)


def _check(*, quick: bool, inference: bool, snapshot: Path | None, asked: bool, by_module: bool) -> None:
    """Raises UsageError for options that do not go together."""
    if quick and (inference or snapshot is not None):
        raise UsageError("--quick knows neither --inference nor --snapshot, which need a rehearsal; leave --quick away")
    if by_module and (quick or inference):
        raise UsageError("--modules rehearses a training step: leave --quick and --inference away")
    if asked and inference:
        raise UsageError("--advice is on training a recipe, and --inference is of writing; leave one of them away")


def _print_json(
    prediction: Prediction, taken: Cost | None, given: Sequence[Advice] | None, rows: Sequence[ModuleRow] | None
) -> None:
    taking = {} if taken is None else {"cost": taken.to_dict()}
    advised = {} if given is None else {"advice": [one.to_dict() for one in given]}
    held = {} if rows is None else {"modules": [row.to_dict() for row in rows]}
    console.print_json(prediction.to_dict() | taking | held | advised)


def _by_module(spec: ModelSpec, recipe: Recipe, device: Device) -> tuple[ModuleRow, ...]:
    from brim.rehearsal import rehearse_modules

    return rehearse_modules(spec, recipe, device=device)


def _draw(path: Path | None, prediction: Prediction, trace: "Trace | None", *, budget_bytes: int | None) -> None:
    picture.draw(
        path,
        title=f"{prediction.model} on {_place(prediction)}",
        bars={"predicted": prediction.ledger},
        budget_bytes=budget_bytes,
        trace=trace,
    )


def _estimated(spec: ModelSpec, recipe: Recipe, device: Device, budget_bytes: int) -> Prediction:
    from brim.planning.estimate import estimate

    return estimate(spec, recipe, device=device, budget_bytes=budget_bytes)


def _trace(
    spec: ModelSpec, recipe: Recipe, device: Device, snapshot: Path | None, *, new_tokens: int | None
) -> "Trace":
    """Rehearsed once more, as a prediction keeps no trace, which may be long; written to the snapshot's file."""
    from brim.memory.snapshot import write_snapshot
    from brim.rehearsal import rehearse_trace, written_trace

    if new_tokens is None:
        trace = rehearse_trace(spec, recipe, device=device)
    else:
        writing = Writing(batch_size=recipe.micro_batch_size, context=recipe.seq_len, new_tokens=new_tokens)
        trace = written_trace(spec, recipe, writing, device=device).trace
    if snapshot is not None:
        write_snapshot(snapshot, trace)
    return trace


def _place(prediction: Prediction) -> str:
    """The device; of several the busiest, and what they share."""
    parallel = prediction.recipe["parallel"]
    count = parallel["nodes"] * parallel["devices_per_node"]
    if count == 1:
        return prediction.device_name
    tensor = [f"tensor {parallel['tensor']}"] if parallel["tensor"] > 1 else []
    shared = [parallel["sharding"]] if parallel["sharding"] != "none" else []
    return f"{prediction.device_name}, the busiest of {count} ({' x '.join([*shared, *tensor])})"


def show(prediction: Prediction) -> None:
    """The ledger as a table, largest line first, and what it means."""
    table = Table(title=f"{prediction.model} on {_place(prediction)}", title_justify="left")
    table.add_column("owner")
    table.add_column("at the peak", justify="right")
    table.add_column("share", justify="right")
    total = prediction.ledger.total
    for line, nbytes in sorted(prediction.ledger.to_dict().items(), key=lambda item: -item[1]):
        if nbytes:
            table.add_row(line, units.format_bytes(nbytes), f"{100 * nbytes / total:.1f} %")
        if line == "activations" and prediction.inference is not None:
            cached = prediction.inference.kv_cache_at_peak_bytes
            table.add_row("  of it kv_cache", units.format_bytes(cached), f"{100 * cached / total:.1f} %")
    table.add_section()
    for name, peak in prediction.peak.to_dict().items():
        if peak is not None:
            table.add_row(f"peak {name.removesuffix('_bytes')}", units.format_bytes(peak), f"{peak:,} B")
    if prediction.moments:
        table.add_section()
    for moment in prediction.moments:
        table.add_row(f"in {moment.name}", units.format_bytes(moment.allocated_bytes), f"{moment.allocated_bytes:,} B")
    console.out.print(table)
    asked = prediction.inference
    if asked is not None:
        console.out.print(
            f"{asked.batch_size} x {asked.context} tokens read, {asked.new_tokens} written after each; "
            f"the cache is {units.format_bytes(asked.kv_cache_bytes)} at the last"
        )
    if prediction.peak.device_bytes is not None:
        low, high = (prediction.peak.highest_bytes * (1 + end) for end in prediction.error_band)
        console.out.print(
            f"between {units.format_bytes(int(low))} and {units.format_bytes(int(high))}, as published runs went"
        )
    fits = "fits" if prediction.fits else "does not fit"
    console.out.print(
        f"{fits} in {units.format_bytes(prediction.budget_bytes)}; "
        f"{_time(prediction)} {'a step' if asked is None else 'in all'}, "
        f"{units.format_count(prediction.tokens_per_s)} tokens/s{'' if asked is None else ' written'} "
        f"({prediction.method})"
    )
    if prediction.step_time_basis == CPU_ROOFLINE:
        console.note("the step's time is rough: brim doctor --calibrate measures what this machine achieves")
    for reason in prediction.reasons:
        console.note(reason)


def _time(prediction: Prediction) -> str:
    """About how long, and from when to when; the range alone where runs have shown the estimate to be outside it."""
    about = f"about {units.format_duration(prediction.step_time_s)}"
    if prediction.step_time_range_s is None:
        return about
    low, high = prediction.step_time_range_s
    span = f"{units.format_duration(low)} to {units.format_duration(high)}"
    return f"{about} ({span})" if low <= prediction.step_time_s <= high else span
