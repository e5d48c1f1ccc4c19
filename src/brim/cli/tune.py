"""`brim tune`: runs a recipe and shows predicted beside measured."""

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from brim import units
from brim.cli import console, fallback, options, picture, shown
from brim.errors import DoesNotFitError, Stopped, UsageError
from brim.hardware.detect import detect_host
from brim.hardware.rates import cpu_identity
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.report import LEDGER_LINES, Prediction, RunReport
from brim.speed.bands import keep_run
from brim.training.processes import is_first, is_rank, run_ranks

if TYPE_CHECKING:
    from brim.training.job import Run
    from brim.training.metrics import StepRecord

_FEWEST_TIMED_STEPS = 3
"""The first step sets things up; a median needs some more."""


def command(
    source: options.Source,
    data: Annotated[
        Path | None, typer.Option(help="Training data: .jsonl, .json, .csv, .parquet, text or a Hub id.")
    ] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Data to measure the loss on and not to learn from.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory to make; default runs/MODEL-METHOD.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps; default as the recipe's epochs give.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    show: Annotated[
        bool, typer.Option("--show-data", help="Show the first examples, marked by what is trained, and end.")
    ] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Also write the model with the adapter in it.")] = False,
    device: options.DeviceName = "cpu",
    memory: options.Memory = None,
    method: options.Method = None,
    seq_len: options.SeqLen = None,
    micro_batch_size: options.MicroBatchSize = None,
    gpus: options.Gpus = None,
    nodes: options.Nodes = None,
    sharding: options.Sharding = None,
    tensor: options.Tensor = None,
    settings: options.Settings = None,
    plot: picture.Plot = None,
    json: options.Json = False,
) -> int:
    """Run a recipe; predicted beside measured at the end."""
    picture.check(plot)
    if data is None:
        raise UsageError("no data to learn from; add --data FILE.jsonl (one object a line) or a plain text file")
    steps = [f"training.max_steps={max_steps}"] if max_steps is not None else []
    spread = options.spread(gpus=gpus, nodes=nodes, sharding=sharding, tensor=tensor)
    recipe, spec = options.recipe_of(
        source,
        method=method,
        seq_len=seq_len,
        micro_batch_size=micro_batch_size,
        settings=[*spread, *(settings or []), *steps],
    )
    _check_merge(recipe, merge=merge)
    if show:
        return _show(recipe, spec, data, json=json)
    target = output or Path("runs") / f"{Path(recipe.model).name}-{recipe.method}"
    places = {"--data": data, "--eval-data": eval_data, "--output": target, "--plot": plot}
    if recipe.parallel.devices > 1 and not is_rank():
        check_place(target, resume=resume)
        return start_ranks(recipe, places, device=device, memory=memory, resume=resume, json=json)
    cap = None if memory is None else units.parse_bytes(memory)
    report = _run(recipe, spec, data, eval_data, target, device=device, cap=cap, resume=resume, merge=merge)
    if is_first():
        _draw(plot, report, target, budget_bytes=None if cap is None else report.predicted.budget_bytes)
        _conclude(report, device, target, json=json)
    return 0


def _show(recipe: Recipe, spec: ModelSpec, data: Path, *, json: bool) -> int:
    """The data as the model would see it; nothing is trained, and no weights are needed."""
    from brim.models.quiet import quiet_transformers

    with quiet_transformers():
        from brim.training.start import prepare_shown

        with console.progress(f"reading {data}") as progress:
            found, tokenizer = prepare_shown(recipe, spec, data, progress=progress)
        shown.show_data(found, tokenizer, recipe, json=json)
    return 0


def _run(
    recipe: Recipe,
    spec: ModelSpec,
    data: Path,
    eval_data: Path | None,
    target: Path,
    *,
    device: str,
    cap: int | None,
    resume: bool,
    merge: bool,
) -> RunReport:
    """In this process: alone, or one of several ranks."""
    from brim.models.quiet import quiet_transformers

    with quiet_transformers(), stop_on_signal() as stop:
        from brim.training.loop import run
        from brim.training.ranks import joined_ranks
        from brim.training.start import prepare

        if is_first():
            check_place(target, resume=resume)
            note_warnings(recipe, eval_data)
        predicted = predict(recipe, spec, device, cap)
        with joined_ranks(recipe, device) as ranks:
            with console.progress(f"preparing {spec.name}") as progress:
                job = prepare(
                    recipe,
                    spec,
                    data=data,
                    eval_data=eval_data,
                    output=target,
                    predicted=predicted,
                    device=device,
                    resume=resume,
                    merge=merge,
                    ranks=ranks,
                    cap_bytes=None if cap is None else predicted.budget_bytes,
                    progress=progress,
                )
            if is_first():
                note_work(job)

            def trained(job: "Run") -> RunReport:
                with show_steps(job.recipe) as on_step:
                    return run(job, on_step=on_step, should_stop=stop.asked_after_step, tell=console.note)

            return fallback.first_that_fits(job, trained, lambda lighter: predict(lighter, spec, device, cap))


def _check_merge(recipe: Recipe, *, merge: bool) -> None:
    """Raises UsageError where there is no adapter to merge, or no process has the whole of the weights."""
    if merge and not recipe.adapts:
        raise UsageError(f'--merge puts an adapter into its base, and method = "{recipe.method}" trains none')
    if merge and recipe.parallel.devices > 1:
        raise UsageError(
            "--merge writes from one process, and the recipe divides the weights among "
            f"{recipe.parallel.devices}; leave it away, and merge the adapter with PEFT"
        )


def start_ranks(
    recipe: Recipe, places: Mapping[str, Path | None], *, device: str, memory: str | None, resume: bool, json: bool
) -> int:
    """The same command once for each of this machine's devices; the exit code of what ended it.

    Raises UsageError where the recipe wants other machines, too.
    """
    command = [sys.executable, "-m", "brim.cli", "tune"]
    options_given = [item for key, place in places.items() if place is not None for item in (key, str(place))]
    options_given += ["--device", device, *(["--memory", memory] if memory is not None else [])]
    options_given += ["--resume"] * resume + ["--json"] * json
    nodes, devices = recipe.parallel.nodes, recipe.parallel.devices_per_node
    if nodes > 1:
        raise UsageError(
            f"the recipe has {nodes} nodes, and brim tune starts processes on one: on each of them run "
            f"torchrun --nnodes={nodes} --nproc_per_node={devices} --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 "
            "-m brim.cli tune RECIPE ..., with the output on a disk that all share"
        )
    with TemporaryDirectory(prefix="brim-recipe-") as directory:
        written = Path(directory) / "recipe.toml"
        written.write_text(recipe.to_toml(), encoding="utf-8")
        return run_ranks([*command, str(written), *options_given], devices)


def predict(recipe: Recipe, spec: ModelSpec, device: str, cap: int | None) -> Prediction:
    """The rehearsed prediction. Raises DoesNotFitError before anything runs that would not fit."""
    from brim.hardware.measure import resolve_device
    from brim.rehearsal import rehearse

    found = resolve_device(device, cap)
    predicted = rehearse(spec, recipe, device=found, budget_bytes=options.budget_of(found, cap, recipe))
    refuse_if_over(predicted)
    return predicted


def _conclude(report: RunReport, device: str, target: Path, *, json: bool) -> None:
    """Print the report, and keep its step time: the next prediction's range knows how this run went."""
    if device == "cpu" and report.steps >= _FEWEST_TIMED_STEPS and not report.measured.ranks:
        keep_run(
            basis=report.predicted.step_time_basis,
            identity=cpu_identity(detect_host()),
            predicted_s=report.predicted.step_time_s,
            measured_s=report.measured.step_time_s,
        )
    if json:
        console.print_json(report.to_dict())
    else:
        show(report)
        console.out.print(f"written: {target}", markup=False)


def _draw(plot: Path | None, report: RunReport, target: Path, *, budget_bytes: int | None) -> None:
    if plot is None:
        return
    from brim.training.picture import panels

    picture.draw(
        plot,
        title=f"{report.model}, {report.recipe['method']}: predicted and measured peak",
        bars={"predicted": report.predicted.ledger, "measured": report.measured.ledger},
        budget_bytes=budget_bytes,
        below=panels(target, predicted_bytes=report.predicted.peak.allocated_bytes),
    )


def check_place(target: Path, *, resume: bool) -> None:
    """Refuse an output that is taken before anything takes time; say when there is nothing to resume."""
    from brim.training.workplace import can_resume, check_output

    check_output(target, resume=resume)
    if resume and not can_resume(target):
        console.note(f"nothing to resume at {target}: starting at the first step")


def note_warnings(recipe: Recipe, eval_data: Path | None) -> None:
    """Say which settings have no effect in this run."""
    for warning in recipe.warnings():
        console.note(warning)
    if recipe.training.evaluate_every and eval_data is None:
        console.note("training.evaluate_every has no effect without --eval-data FILE")


def note_work(job: "Run") -> None:
    """What is learned from, and how long it will take."""
    from brim.training.workplace import steps_kept

    console.note(shown.data_line(job.data, job.recipe))
    done = steps_kept(job.output) if job.resume else 0
    console.note(shown.time_line(job.data, job.recipe, job.predicted, steps_done=done))


def refuse_if_over(predicted: Prediction) -> None:
    """Raises DoesNotFitError before anything runs that would not fit."""
    if not predicted.fits:
        missing = predicted.peak.highest_bytes - predicted.budget_bytes
        raise DoesNotFitError(
            f"{predicted.model}: this recipe needs {units.format_bytes(predicted.peak.highest_bytes)}, "
            f"{units.format_bytes(missing)} more than the {units.format_bytes(predicted.budget_bytes)} it may use; "
            f"ask for one that fits: brim plan {predicted.model} --device cpu --memory "
            f"{units.format_bytes(predicted.budget_bytes).replace(' ', '')}"
        )


def show(report: RunReport) -> None:
    """Predicted beside measured, line by line."""
    predicted, measured = report.predicted, report.measured
    table = Table(title=f"{report.model}: {report.steps} steps", title_justify="left")
    for column in ("at the peak", "predicted", "measured", "difference"):
        table.add_column(column, justify="left" if column == "at the peak" else "right")
    for line in LEDGER_LINES:
        ours, theirs = getattr(predicted.ledger, line), getattr(measured.ledger, line)
        if ours or theirs:
            table.add_row(line, units.format_bytes(ours), units.format_bytes(theirs), f"{ours - theirs:+,} B")
    table.add_section()
    ours, theirs = predicted.peak.allocated_bytes, measured.peak.allocated_bytes
    error = 100 * report.relative_error["allocated_bytes"]
    busiest = " (busiest rank)" if measured.ranks else ""
    table.add_row(f"peak allocated{busiest}", f"{ours:,} B", f"{theirs:,} B", f"{error:+.4f} %")
    table.add_row(
        "step time",
        units.format_duration(predicted.step_time_s),
        units.format_duration(measured.step_time_s),
        f"{100 * report.relative_error['step_time_s']:+.0f} %",
    )
    console.out.print(table)
    console.out.print(
        f"loss {report.first_loss:.4f} -> {report.last_loss:.4f}; {units.format_count(measured.tokens_per_s)} tokens/s"
    )
    if measured.ranks:
        peaks = ", ".join(units.format_bytes(peak.allocated_bytes) for peak in measured.ranks)
        console.out.print(f"peak of each rank: {peaks}")
    if report.evaluation:
        console.out.print(
            f"on the evaluation data: loss {report.evaluation['loss']:.4f}, "
            f"perplexity {report.evaluation['perplexity']:.2f}"
        )


class StopSignal:
    """Before the first step a signal ends the command; later the first one does after the step, the second at once."""

    def __init__(self) -> None:
        self._trains = False
        self._asked = False

    def asked_after_step(self) -> bool:
        """Whether to stop now; the run asks before its first step and after each."""
        self._trains = True
        return self._asked

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._trains and not self._asked:
            self._asked = True
            console.note("stopping after this step; once more to stop at once")
        elif number == signal.SIGTERM:
            raise Stopped("stopped by SIGTERM; go on with the same command and --resume")
        else:
            raise KeyboardInterrupt


@contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    """SIGINT and SIGTERM end the run in a way that it can go on from."""
    stop = StopSignal()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def show_steps(recipe: Recipe) -> "Iterator[Callable[[StepRecord], None]]":
    """A live line a step on a terminal, plain lines elsewhere."""
    with console.progress_bar(recipe.model) as bar:

        def on_step(record: "StepRecord") -> None:
            bar(record.step, record.steps, step_line(record))

        yield on_step


def step_line(record: "StepRecord") -> str:
    evaluated = "" if record.eval_loss is None else f"on evaluation data {record.eval_loss:.4f}  "
    return (
        f"step {record.step}/{record.steps}  loss {record.loss:.4f}  {evaluated}"
        f"{units.format_count(record.tokens_per_s)} tokens/s  "
        f"memory {units.format_bytes(record.allocated_bytes)}, peak {units.format_bytes(record.peak_bytes)}  "
        f"{units.format_duration(record.seconds_left)} left"
    )
