"""`brim quantize MODEL`: a smaller checkpoint, and what that cost."""

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.table import Table

from brim import units
from brim.checkpoints.targets import TOKENS, CalibrationText, Family, ScaleChoice, Target, Wanted, wanted_of
from brim.cli import console, picture
from brim.cli.options import Json
from brim.errors import UsageError
from brim.report import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Callable

    from brim.checkpoints.audit import QuantizationReport
    from brim.checkpoints.mixture import Mixture
    from brim.checkpoints.portrait import Portrait

WORST = 5
_To = Annotated[
    list[str],
    typer.Option(
        metavar="FORMAT",
        help="int8, int4, nf4, mxfp4, fp8, fp8_e5m2, q8_0, q4_0, fp32, fp16 or bf16; may be repeated.",
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A directory to make; default: ./MODEL-FORMAT.", show_default=False),
]
_Layout = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Whose form: plain, compressed-tensors, bitsandbytes, torchao, gguf; default: as suits FORMAT. Several, "
        "of formats too, are made in one pass, each in DIR/FORMAT-LAYOUT.",
        show_default=False,
    ),
]
_Unpickle = Annotated[
    bool, typer.Option("--unpickle", help="Read pytorch_model.bin: tensors alone, but by torch's unpickler.")
]
_Granularity = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="What shares a scale: tensor, channel or group:SIZE; default: int4 group:32, others channel.",
        show_default=False,
    ),
]

_Scales = Annotated[str, typer.Option(metavar="HOW", help="Of integers: absmax, or mse (least squared error; slower).")]
_Asymmetric = Annotated[
    bool, typer.Option("--asymmetric", help="INT8 and INT4 with zero points: from the least element to the greatest.")
]
_Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Linear weights to leave as they are: a glob, or re:EXPRESSION, of their whole names; may be repeated.",
        show_default=False,
    ),
]
_Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="PATTERN=FORMAT",
        help="Those that get another format, int8 or int4; may be repeated, the last that matches counts.",
        show_default=False,
    ),
]
_Budget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Of all tensors: int8, int4 or neither for each linear weight, with the least error within it.",
        show_default=False,
    ),
]
_Audit = Annotated[bool, typer.Option("--audit", help="Only say what it would cost, tensor by tensor; write nothing.")]
_Plot = Annotated[
    Path | None,
    typer.Option(help="Draw what each tensor lost, by layer: FILE.svg or FILE.png.", show_default=False),
]
_Tensor = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="With --plot: this weight's elements, too, before and after.", show_default=False
    ),
]
_Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text like that the model is for, and not what it is evaluated on; implies --scales calibrated.",
        show_default=False,
    ),
]
_CalibrationTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Of the text's beginning.")]
_Memory = Annotated[
    str, typer.Option(metavar="SIZE", help="Beside what the interpreter takes, whatever the model's size.")
]


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, Hub id, directory or .gguf file.")],
    to: _To,
    output: _Output = None,
    layout: _Layout = None,
    granularity: _Granularity = None,
    scales: _Scales = "absmax",
    asymmetric: _Asymmetric = False,
    keep: _Keep = None,
    formats: _Formats = None,
    budget: _Budget = None,
    calibration: _Calibration = None,
    calibration_tokens: _CalibrationTokens = TOKENS,
    unpickle: _Unpickle = False,
    memory: _Memory = "512MiB",
    resume: Annotated[bool, typer.Option(help="Go on with a killed or interrupted run.")] = False,
    audit_only: _Audit = False,
    plot: _Plot = None,
    tensor: _Tensor = None,
    json: Json = False,
) -> None:
    """A smaller checkpoint: floats, INT8, INT4, MXFP4 or FP8 linear weights, or a GGUF file."""
    from brim.checkpoints.mixture import parse_mixture
    from brim.numerics.granularity import parse_granularity

    targets = [_target(name, get_args(Target)) for name in to]
    wanted = wanted_of(targets, [_family(name, get_args(Family)) for name in layout or ()])
    choice = _choice("calibrated" if calibration else scales, get_args(ScaleChoice))
    text = _calibration_text(calibration, calibration_tokens)
    _check_audit(audit_only, output=output, resume=resume, calibration=calibration)
    _check_several(wanted, calibration=calibration, plot=plot)
    picture.check(plot)
    _check_tensor(tensor, plot=plot, calibration=calibration)
    place = output or Path(f"{_short_name(model)}-{'-'.join(targets)}")
    settings: dict[str, Any] = {"scales": choice, "memory_bytes": units.parse_bytes(memory)}
    settings["granularity"] = None if granularity is None else parse_granularity(granularity)
    mixture = parse_mixture(keep=keep or (), formats=formats or ())
    source = _prepared(model, None if audit_only else place, unpickle=unpickle)
    started = time.perf_counter()
    if budget is not None:
        mixture = _within(budget, source, mixture, settings, unpickle=unpickle)
    settings |= {"mixture": mixture, "symmetric": not asymmetric, "unpickle": unpickle}
    drawn = _portrait(source, tensor, wanted=wanted[0], **settings)
    listeners: dict[str, units.Progress] = {}
    with ExitStack() as bars:
        if text is not None:
            listeners["calibration_progress"] = bars.enter_context(console.progress("calibrating"))
        doing = f"{'auditing for' if audit_only else 'quantizing to'} {', '.join(targets)}"
        listeners["progress"] = bars.enter_context(console.progress(doing, in_bytes=True))
        work = _work(source, None if audit_only else place, wanted, text, resume=resume)
        reports = work(**settings, **listeners)
    _draw(plot, reports[0], drawn)
    told = reports, wanted, model, None if audit_only else place, time.perf_counter() - started
    if json:
        console.print_json(_to_dict(*told))
    else:
        _print_all(*told, default=place)


def _work(
    source: Path, place: Path | None, wanted: tuple[Wanted, ...], text: CalibrationText | None, *, resume: bool
) -> "Callable[..., tuple[QuantizationReport, ...]]":
    """Takes what conversions of any number have in common."""
    from brim.checkpoints.convert import audit_all, quantize, quantize_all

    if place is None:
        return partial(audit_all, source, wanted)
    if len(wanted) > 1:
        return partial(quantize_all, source, place, wanted, resume=resume)
    (to, layout), one = wanted[0], partial(quantize, source, place, calibration=text, resume=resume)
    return lambda **settings: (one(to=to, layout=layout, **settings),)


def _check_several(wanted: tuple[Wanted, ...], *, calibration: Path | None, plot: Path | None) -> None:
    if len(wanted) > 1 and (calibration or plot):
        option = "--calibration" if calibration else "--plot"
        raise UsageError(f"{option} is for one output, and {', '.join(each.name for each in wanted)} are asked for")


def _prepared(model: str, place: Path | None, *, unpickle: bool) -> Path:
    """The directory to read; the place to write is looked at before anything is downloaded."""
    from brim.checkpoints.convert import check_output
    from brim.models import catalogue, describe
    from brim.models.directory import keras_file
    from brim.models.weights import local_directory

    directory = Path(model).expanduser()
    if unpickle and not directory.is_dir():
        raise UsageError(f"--unpickle reads a directory on this machine, and {model} is none; leave --unpickle away")
    as_it_is = unpickle or (catalogue.find(model) is None and keras_file(directory))
    spec = None if as_it_is else describe(model)
    if place is not None:
        check_output(place, source=spec.path if spec else directory)
    if spec is None:
        return directory
    with console.progress(f"preparing {model}") as listen:
        return local_directory(spec, progress=listen)


def _within(budget: str, source: Path, mixture: "Mixture", settings: dict[str, Any], *, unpickle: bool) -> "Mixture":
    from brim.checkpoints.within import within_budget
    from brim.models import describe
    from brim.models.directory import keras_file, stored_tensors

    if unpickle or keras_file(source):
        raise UsageError("--budget weighs safetensors files; make some with --to fp32 first")
    size, spec = units.parse_bytes(budget), describe(str(source.resolve()))
    with console.progress(f"weighing formats for {units.format_bytes(size)}", in_bytes=True) as listen:
        stored = stored_tensors(source)
        return within_budget(source, spec, stored, budget_bytes=size, mixture=mixture, **settings, progress=listen)


def _target(text: str, known: tuple[Target, ...]) -> Target:
    target = next((name for name in known if name == text.lower()), None)
    if target is None:
        raise UsageError(f"cannot quantize to {text!r}; formats: {', '.join(known)}")
    return target


def _check_audit(audit_only: bool, *, output: Path | None, resume: bool, calibration: Path | None) -> None:
    if audit_only and (output or resume):
        raise UsageError("--audit writes nothing; leave --output and --resume out, or leave --audit out")
    if audit_only and calibration:
        raise UsageError("--audit looks at weights alone; leave --calibration out, or leave --audit out")


def _calibration_text(path: Path | None, max_tokens: int) -> CalibrationText | None:
    if path is None:
        return None
    from brim.inference import held_text, read_text

    text = read_text(path)
    if text.strip()[:1000] in held_text():
        raise UsageError(
            f"--calibration {path} is the text that `brim evaluate` judges models by; what is calibrated on it looks "
            "better than it is; use another"
        )
    return CalibrationText(text=text, max_tokens=max_tokens)


def _family(text: str, known: tuple[Family, ...]) -> Family:
    family = next((name for name in known if name == text.lower()), None)
    if family is None:
        raise UsageError(f"unknown layout {text!r}; layouts: {', '.join(known)}")
    return family


def _choice(text: str, known: tuple[ScaleChoice, ...]) -> ScaleChoice:
    choice = next((name for name in known if name == text.lower()), None)
    if choice is None:
        raise UsageError(f"--scales {text!r} is not one of {', '.join(known)}")
    return choice


def _check_tensor(tensor: str | None, *, plot: Path | None, calibration: Path | None) -> None:
    if tensor is not None and (plot is None or calibration is not None):
        raise UsageError(
            "--tensor says which weight --plot FILE draws, without calibration; add --plot, or leave it away"
        )


def _portrait(source: Path, tensor: str | None, **settings: Any) -> "Portrait | None":
    """Before the work: a slip in the name costs nothing."""
    if tensor is None:
        return None
    from brim.checkpoints.portrait import portrait

    return portrait(source, tensor, **settings)


def _draw(path: Path | None, report: "QuantizationReport", drawn: "Portrait | None") -> None:
    if path is None:
        return
    from brim.checkpoints.picture import draw_report

    with picture.whole(path) as partial:
        draw_report(partial, report, drawn)


def _short_name(model: str) -> str:
    """`smollm2-135m` of a name, a Hub id with its revision, a directory or a file."""
    return Path(model.partition("@")[0]).expanduser().resolve().name.removesuffix(".gguf").lower()


def _to_dict(
    reports: "tuple[QuantizationReport, ...]",
    wanted: tuple[Wanted, ...],
    model: str,
    output: Path | None,
    seconds: float,
) -> dict[str, Any]:
    """One report as it is; several by the names of their directories."""
    where = {"model": model, "output": output and str(output), "seconds": seconds}
    if len(reports) == 1:
        return {**reports[0].to_dict(), **where, "schema": SCHEMA}
    outputs = {each.name: report.to_dict() for each, report in zip(wanted, reports, strict=True)}
    return {"schema": SCHEMA, **where, "outputs": outputs}


def _print(report: "QuantizationReport") -> None:
    console.out.print(_sizes(report))
    if worst := _worst(report):
        console.out.print(f"\nThe {worst.row_count} tensors that lost most:")
        console.out.print(worst)


def _print_all(
    reports: "tuple[QuantizationReport, ...]",
    wanted: tuple[Wanted, ...],
    model: str,
    output: Path | None,
    seconds: float,
    *,
    default: Path,
) -> None:
    for report, each in zip(reports, wanted, strict=True):
        if len(reports) > 1:
            console.out.print(f"{each.name}:")
        _print(report)
        if len(reports) > 1:
            console.out.print("")
    if output is None:
        console.note(f"nothing was written; without --audit the model goes to {default}")
        return
    duration = units.format_duration(seconds)
    console.out.print(f"\nwritten to {output} in {duration}; every tensor: quantization_report.json", markup=False)
    for report, each in zip(reports, wanted, strict=True):
        made = output if len(wanted) == 1 else output / each.name
        made = made / "model.gguf" if report.layout == "gguf" else made
        console.note(f"compare: brim evaluate {made} --baseline {model}")


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
