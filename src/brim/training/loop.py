"""Run a recipe: steps, metrics, checkpoints, the finished model; predicted beside measured at the end.

The run works in `OUTPUT.partial` (`workplace`), which becomes OUTPUT when everything is in it. An interrupted run
leaves its last checkpoint there and goes on from it.
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftModel
from safetensors import SafetensorError

from brim.errors import BrimError, RanOutOfMemoryError, Stopped, UsageError
from brim.memory.measured import RealMeter, meter_for
from brim.models import ModelSpec
from brim.publish import alone, write_whole
from brim.recipe import Recipe
from brim.report import Ledger, Measured, Peak, Prediction, RunReport
from brim.training.adapters import save_adapter
from brim.training.build import Workload, build
from brim.training.checkpoint import Progress, load_checkpoint, save_checkpoint, wrong_weight
from brim.training.dataset import DataSet
from brim.training.evaluation import mean_loss
from brim.training.fake_quantized import save_integers
from brim.training.merge import write_merged
from brim.training.metrics import Metrics, StepRecord
from brim.training.packing import check_apart
from brim.training.parts import whole_state
from brim.training.ranks import ALONE, Ranks
from brim.training.schedule import learning_rate
from brim.training.step import train_step
from brim.training.teacher import taught
from brim.training.workplace import (
    can_resume,
    checkpoints_of,
    discard_unbegun,
    explain_full_disk,
    open_workplace,
    publish,
    workplace_of,
)
from brim.units import format_bytes

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""In what gloo and NCCL say when a process that they wait for is gone."""
MERGED = "merged"
"""Where in OUTPUT a merged model is."""
_NAMED_ROWS = 16
_RECENT_STEPS = 100
"""As many steps tell how long the rest will take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What to run and where."""

    recipe: Recipe
    spec: ModelSpec
    weights: Path
    """Directory in Hugging Face form."""
    tokenizer: Any
    data: DataSet
    held: DataSet | None = None
    """Evaluation data: measured every `evaluate_every` steps and at the end, never learned from."""
    output: Path
    predicted: Prediction
    device: str = "cpu"
    resume: bool = False
    merge: bool = False
    """Beside the adapter, in `OUTPUT/merged`, the model with the adapter in it."""
    ranks: Ranks = ALONE


OnStep = Callable[[StepRecord], None]
ShouldStop = Callable[[], bool]


def run(job: Run, *, on_step: OnStep = lambda _: None, should_stop: ShouldStop = lambda: False) -> RunReport:
    """Train and publish OUTPUT. After each step `should_stop` is asked: True saves and raises Stopped.

    With `resume` and nothing to go on from, the run starts at its beginning. Raises UsageError when OUTPUT is there
    already, another run works on it or the loss is no number, DoesNotFitError when the disk lacks the room,
    RanOutOfMemoryError with the ledger when memory ends all the same.

    Of several ranks the first alone writes and tells of steps; a stop that one is asked for stops all.
    """
    if not job.ranks.is_first:
        return _run(job, on_step=lambda _: None, should_stop=should_stop)
    with alone(job.output):
        open_workplace(job.output, job.recipe, job.predicted.ledger, resume=job.resume)
        try:
            return _run(job, on_step=on_step, should_stop=should_stop)
        finally:
            discard_unbegun(job.output)


def _run(job: Run, *, on_step: OnStep, should_stop: ShouldStop) -> RunReport:
    try:
        with meter_for(torch.device(job.device)) as meter:
            torch.manual_seed(job.recipe.training.seed)
            workload = build(job.recipe, job.spec, weights=job.weights, device=job.device, ranks=job.ranks)
            _tell_classes(job, workload)
            with torch.no_grad():
                if workload.head.chunked or job.recipe.has_teacher:
                    workload.loss(_few_tokens(job, workload), look=workload.head.check_finish)
                if job.recipe.training.packing:
                    workload.loss(_few_tokens(job, workload), look=check_apart)
            if job.ranks.data_count > 1:
                # From one seed all ranks would drop the same; those that see the same rows still must.
                torch.manual_seed(job.recipe.training.seed + job.ranks.data_rank)
            if job.recipe.has_teacher:
                with explain_full_disk(job.output, "writing what the teacher says"):
                    job = replace(job, data=taught(workload, job.data, checkpoints_of(job.output)))
            history = _resumed(job, workload)
            _train(job, workload, history, meter, on_step=on_step, should_stop=should_stop)
        report = _report(job, history)
        _publish(job, workload, history, report)
    except BrimError:
        raise
    except (RuntimeError, MemoryError) as error:
        _explain_out_of_memory(job, error)
        _explain_lost_rank(job, error)
        raise
    return report


def _tell_classes(job: Run, workload: Workload) -> None:
    """The saved model names its classes, and finds the end of a row where the data put it."""
    if job.data.classes:
        workload.base.config.id2label = dict(enumerate(job.data.classes))
        workload.base.config.label2id = {name: number for number, name in enumerate(job.data.classes)}
        workload.base.config.pad_token_id = job.data.padding_id


@dataclass(slots=True)
class _History:
    """What was done and measured so far, by this process and by those that it goes on from."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    peak: Peak = field(default_factory=lambda: Peak(allocated_bytes=0))
    ledger: Ledger = field(default_factory=Ledger)
    eval_loss: float | None = None
    meter_name: str = ""

    def measure(self, meter: RealMeter) -> tuple[int, int]:
        """(allocated bytes now, highest since the last time); keeps the peak of all."""
        sample = meter.sample()
        self.meter_name = meter.name
        if meter.peak.allocated_bytes > self.peak.allocated_bytes:
            self.peak, self.ledger = meter.peak, meter.ledger
        return sample

    def progress(self) -> Progress:
        return Progress(
            losses=tuple(self.losses), step_seconds=tuple(self.step_seconds), peak=self.peak, ledger=self.ledger
        )


def _resumed(job: Run, workload: Workload) -> _History:
    """An empty history; after a resume that of the checkpoint, which is now in the workload."""
    progress = load_checkpoint(checkpoints_of(job.output), workload, data=job.data.fingerprint) if job.resume else None
    if progress is None:
        return _History()
    return _History(
        losses=list(progress.losses),
        step_seconds=list(progress.step_seconds),
        peak=progress.peak,
        ledger=progress.ledger,
    )


def _train(
    job: Run, workload: Workload, history: _History, meter: RealMeter, *, on_step: OnStep, should_stop: ShouldStop
) -> None:
    training, steps = job.recipe.training, job.data.steps(job.recipe)
    # Loading maps the weights' file, which the profiler counts; it is page cache, not memory that the run needs.
    meter.start_over()
    history.measure(meter)
    if job.ranks.any(should_stop()):
        raise Stopped("stopped before the first step; start again with the same command and --resume")
    first_step = len(history.losses)
    with Metrics(workplace_of(job.output), first_step=first_step) if job.ranks.is_first else nullcontext() as metrics:
        for step in range(first_step, steps):
            last = step + 1 == steps
            _step(job, workload, history, steps)
            record = _record(job, workload, history, meter, steps)
            if metrics is not None:
                metrics.write(record)
            on_step(record)
            stopping = job.ranks.any(should_stop()) and not last
            if stopping or (training.save_every and (step + 1) % training.save_every == 0 and not last):
                _save(job, workload, history)
            if stopping:
                raise Stopped(f"stopped after step {step + 1} of {steps}; go on with the same command and --resume")
    if job.held is not None and history.eval_loss is None:
        history.eval_loss = mean_loss(workload, job.held)
    _check_weights(workload, steps)


def _step(job: Run, workload: Workload, history: _History, steps: int) -> None:
    step, started = len(history.losses), time.perf_counter()
    rate = learning_rate(job.recipe, step, steps)
    batches = job.data.step_batches(job.recipe, step, data_rank=job.ranks.data_rank)
    loss = float(train_step(workload, batches, learning_rate=rate))
    if not math.isfinite(loss):
        _give_up(job, workload, history, loss)
    history.step_seconds.append(time.perf_counter() - started)
    history.losses.append(loss)
    if workload.loss_scale is not None and workload.loss_scale.exhausted:
        raise UsageError(
            f"gradients of step {step + 1} overflow FP16 at every loss scale down to 1: the run has diverged, or the "
            'model needs a wider range; take precision.weights = "bf16" and precision.compute = "bf16"'
        )


def _give_up(job: Run, workload: Workload, history: _History, loss: float) -> NoReturn:
    """Raises UsageError that names the step's rows; what was learned before is saved if the weights are still good."""
    step = len(history.losses)
    rows = job.data.step_rows(job.recipe, step)
    named = ", ".join(str(row + 1) for row in rows[:_NAMED_ROWS]) + (", ..." if len(rows) > _NAMED_ROWS else "")
    places = job.data.places_of(rows)
    read = f" ({'; '.join(places[:_NAMED_ROWS])}{'; ...' if len(places) > _NAMED_ROWS else ''})" if places else ""
    if step and not wrong_weight(workload):
        _save(job, workload, history)
    kept = (
        f"{checkpoints_of(job.output)} holds what was learned before" if can_resume(job.output) else "nothing is kept"
    )
    raise UsageError(
        f"the loss of step {step + 1} is {loss}, over rows {named} of the {len(job.data)} that the data makes{read}: "
        f"the run has diverged; {kept}; lower optimizer.learning_rate, compute in fp32, or look at those rows"
    )


def _record(job: Run, workload: Workload, history: _History, meter: RealMeter, steps: int) -> StepRecord:
    """What is known after the step that was just done; evaluates when it is time to."""
    step, training, scale = len(history.losses), job.recipe.training, workload.loss_scale
    _, allocated_bytes = history.measure(meter)
    allocated_bytes, peak_bytes = job.ranks.highest(allocated_bytes, history.peak.allocated_bytes)
    history.eval_loss = None
    if job.held is not None and (step == steps or (training.evaluate_every and step % training.evaluate_every == 0)):
        history.eval_loss = mean_loss(workload, job.held)
        _check_number(history.eval_loss, f"the evaluation loss after step {step}")
    return StepRecord(
        step=step,
        steps=steps,
        loss=history.losses[-1],
        learning_rate=learning_rate(job.recipe, step - 1, steps),
        tokens_per_s=job.recipe.tokens_per_step / history.step_seconds[-1],
        allocated_bytes=allocated_bytes,
        peak_bytes=peak_bytes,
        seconds_left=(steps - step) * statistics.median(history.step_seconds[-_RECENT_STEPS:]),
        eval_loss=history.eval_loss,
        loss_scale=None if scale is None else scale.value,
        skipped=scale is not None and scale.skipped,
    )


def _save(job: Run, workload: Workload, history: _History) -> None:
    _check_weights(workload, len(history.losses))
    with explain_full_disk(job.output, "saving a checkpoint"):
        save_checkpoint(checkpoints_of(job.output), workload, history.progress(), data=job.data.fingerprint)


def _check_number(value: float, subject: str) -> None:
    if not math.isfinite(value):
        raise UsageError(
            f"{subject} is {value}: the run has diverged; lower optimizer.learning_rate, or compute in fp32"
        )


def _check_weights(workload: Workload, step: int) -> None:
    """Raises UsageError when a gradient that was no number has reached the weights (the loss shows it a step later)."""
    if name := wrong_weight(workload):
        _check_number(math.nan, f"a weight of {name} after step {step}")


def _few_tokens(job: Run, workload: Workload) -> dict[str, torch.Tensor]:
    """Enough of the data for one look at the logits."""
    batch = job.data.step_batches(job.recipe, 0, data_rank=job.ranks.data_rank)[0]
    inputs = {"input_ids": batch.input_ids[:1, :8].to(workload.device)}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if job.recipe.task == "seq2seq-lm":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def _report(job: Run, history: _History) -> RunReport:
    peaks = job.ranks.told((history.peak, history.ledger))
    peak, ledger = max(peaks, key=lambda measured: measured[0].highest_bytes)
    step_time_s = statistics.median(history.step_seconds[1:] or history.step_seconds)
    evaluation = {}
    if history.eval_loss is not None:
        evaluation = {"loss": history.eval_loss, "perplexity": math.exp(min(history.eval_loss, 700.0))}
    return RunReport(
        model=job.spec.name,
        recipe=job.recipe.to_dict(),
        steps=len(history.losses),
        first_loss=history.losses[0],
        last_loss=history.losses[-1],
        predicted=job.predicted,
        measured=Measured(
            peak=peak,
            ledger=ledger,
            ranks=tuple(own for own, _ in peaks) if job.ranks.count > 1 else (),
            step_time_s=step_time_s,
            tokens_per_s=job.recipe.tokens_per_step / step_time_s,
            meter=history.meter_name,
        ),
        environment=environment(),
        evaluation=evaluation,
        reasons=tuple(job.recipe.warnings()),
    )


def environment() -> dict[str, str]:
    """Versions that decide memory and speed."""
    packages = ("brim", "torch", "transformers", "peft")
    return {name: version(name) for name in packages} | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


def _publish(job: Run, workload: Workload, history: _History, report: RunReport) -> None:
    """Model (or adapter), tokenizer and report into OUTPUT; when that fails, what was learned stays as a checkpoint."""

    # Several ranks each have a part; those that do not write take part in gathering them.
    whole = whole_state(workload.model, keep=job.ranks.is_first) if job.ranks.count > 1 else None

    def write(directory: Path) -> None:
        # Training needs it off; who uses the model expects it as it was.
        workload.base.config.use_cache = job.spec.config.get("use_cache", True)
        if isinstance(workload.model, PeftModel):
            save_adapter(workload.model, job.spec, directory, state=whole)
            if job.merge:
                (directory / MERGED).mkdir()
                write_merged(workload.model, directory / MERGED)
                job.tokenizer.save_pretrained(directory / MERGED)
        elif job.recipe.method == "qat":
            save_integers(workload.base, directory, job.recipe)
        else:
            workload.base.save_pretrained(directory, state_dict=whole)
        job.tokenizer.save_pretrained(directory)
        write_whole(directory / "report.json", json.dumps(report.to_dict(), indent=2))

    failure: OSError | SafetensorError | None = None
    if job.ranks.is_first:
        try:
            publish(job.output, write)
        except (OSError, SafetensorError) as error:
            failure = error
    if job.ranks.any(failure is not None):
        _save(job, workload, history)
    if failure is not None:
        with explain_full_disk(job.output, "writing the model"):
            raise failure


def _explain_lost_rank(job: Run, error: BaseException) -> None:
    """Raises Stopped when another process of the run has ended, which is the one that knows why."""
    if job.ranks.count > 1 and any(words in str(error) for words in _LOST):
        raise Stopped("another rank has ended; go on with the same command and --resume") from error


def _explain_out_of_memory(job: Run, error: BaseException) -> None:
    """Raises RanOutOfMemoryError when that is what happened."""
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        ledger = ", ".join(
            f"{line} {format_bytes(size)}" for line, size in job.predicted.ledger.to_dict().items() if size
        )
        raise RanOutOfMemoryError(
            f"out of memory; predicted was {format_bytes(job.predicted.peak.allocated_bytes)} ({ledger}); "
            "plan again with a smaller --memory, and see that nothing else fills the machine"
        ) from error
