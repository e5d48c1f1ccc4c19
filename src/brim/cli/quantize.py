"""`brim quantize MODEL`: a smaller checkpoint, and what that cost."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.table import Table

from brim import units
from brim.cli import console, picture
from brim.cli.options import Json
from brim.errors import UsageError
from brim.report import SCHEMA

if TYPE_CHECKING:
    from brim.checkpoints.audit import QuantizationReport
    from brim.checkpoints.job import ScaleChoice, Target

WORST = 5
_Granularity = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="What shares a scale: channel or group:SIZE; default: int4 group:32, others channel.",
        show_default=False,
    ),
]

_Scales = Annotated[str, typer.Option(metavar="HOW", help="Of integers: absmax, or mse (least squared error; slower).")]
_Memory = Annotated[
    str, typer.Option(metavar="SIZE", help="Beside what the interpreter takes, whatever the model's size.")
]


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, Hub id, directory or .gguf file.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="int8, int4, fp8, fp16 or bf16.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A directory to make; default: ./MODEL-FORMAT.", show_default=False),
    ] = None,
    granularity: _Granularity = None,
    scales: _Scales = "absmax",
    memory: _Memory = "512MiB",
    resume: Annotated[bool, typer.Option(help="Go on with a killed or interrupted run.")] = False,
    audit_only: Annotated[
        bool, typer.Option("--audit", help="Only say what it would cost, tensor by tensor; write nothing.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw what each tensor lost, by layer: FILE.svg or FILE.png.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """A smaller checkpoint: FP16, BF16, or INT8, INT4 or FP8 linear weights."""
    from brim.checkpoints.convert import audit, check_output, quantize
    from brim.checkpoints.job import ScaleChoice, Target
    from brim.models import describe
    from brim.models.weights import local_directory
    from brim.numerics.granularity import parse_granularity

    target = _target(to, get_args(Target))
    choice = _choice(scales, get_args(ScaleChoice))
    if audit_only and (output or resume):
        raise UsageError("--audit writes nothing; leave --output and --resume out, or leave --audit out")
    picture.check(plot)
    spec = describe(model)
    place = output or Path(f"{_short_name(model)}-{target}")
    shared = None if granularity is None else parse_granularity(granularity)
    memory_bytes = units.parse_bytes(memory)
    if not audit_only:
        check_output(place, source=spec.path)  # before anything is downloaded
    with console.progress(f"preparing {model}") as listen:
        source = local_directory(spec, progress=listen)
    started = time.perf_counter()
    with console.progress(f"{'auditing for' if audit_only else 'quantizing to'} {target}", in_bytes=True) as listen:
        work = partial(audit, source) if audit_only else partial(quantize, source, place, resume=resume)
        report = work(to=target, granularity=shared, scales=choice, memory_bytes=memory_bytes, progress=listen)
    seconds = time.perf_counter() - started
    _draw(plot, report)
    if json:
        console.print_json(_to_dict(report, model, None if audit_only else place, seconds))
        return
    _print(report)
    if audit_only:
        console.note(f"nothing was written; without --audit the model goes to {place}")
        return
    duration = units.format_duration(seconds)
    console.out.print(f"\nwritten to {place} in {duration}; every tensor: quantization_report.json", markup=False)
    console.note(f"compare: brim evaluate {place} --baseline {model}")


def _target(text: str, known: "tuple[Target, ...]") -> "Target":
    target = next((name for name in known if name == text.lower()), None)
    if target is None:
        raise UsageError(f"cannot quantize to {text!r}; formats: {', '.join(known)}")
    return target


def _choice(text: str, known: "tuple[ScaleChoice, ...]") -> "ScaleChoice":
    choice = next((name for name in known if name == text.lower()), None)
    if choice is None:
        raise UsageError(f"--scales {text!r} is not one of {', '.join(known)}")
    return choice


def _draw(path: Path | None, report: "QuantizationReport") -> None:
    if path is None:
        return
    from brim.checkpoints.picture import draw_report

    with picture.whole(path) as partial:
        draw_report(partial, report)


def _short_name(model: str) -> str:
    """`smollm2-135m` of a name, a Hub id with its revision, a directory or a file."""
    return Path(model.partition("@")[0]).expanduser().resolve().name.removesuffix(".gguf").lower()


def _to_dict(report: "QuantizationReport", model: str, output: Path | None, seconds: float) -> dict[str, Any]:
    where = {"model": model, "output": output and str(output), "seconds": seconds}
    return {**report.to_dict(), **where, "schema": SCHEMA}


def _print(report: "QuantizationReport") -> None:
    console.out.print(_sizes(report))
    if worst := _worst(report):
        console.out.print(f"\nThe {worst.row_count} tensors that lost most:")
        console.out.print(worst)


def _sizes(report: "QuantizationReport") -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("tensors", "before", "after", "ratio"):
        table.add_column(name, justify="right")
    changed = set(report.converted)
    kept = [tensor for tensor in report.tensors if tensor not in changed]
    for title, tensors in ((f"to {report.to}", report.converted), ("kept as they were", kept), ("all", report.tensors)):
        if not tensors:
            continue
        before, after = sum(t.bytes_before for t in tensors), sum(t.bytes_after for t in tensors)
        sizes = (units.format_bytes(before), units.format_bytes(after), f"{after / before:.3f}" if before else "")
        table.add_row(title, str(len(tensors)), *sizes)
    return table


def _worst(report: "QuantizationReport") -> Table | None:
    """Tensors by least ratio of signal to noise; None where nothing was lost."""
    lost = sorted((t for t in report.tensors if t.sqnr_db is not None), key=lambda t: t.sqnr_db or 0.0)[:WORST]
    if not lost:
        return None
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("tensor", overflow="fold")
    for name in ("SQNR", "max error", "zeroed", "clipped"):
        table.add_column(name, justify="right")
    for tensor in lost:
        table.add_row(
            tensor.name, f"{tensor.sqnr_db:.1f} dB", f"{tensor.largest_error:.3g}",
            f"{tensor.zeroed_share:.2%}", f"{tensor.clipped_share:.2%}",
        )  # fmt: skip
    return table
