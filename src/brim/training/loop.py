"""Run a recipe: steps, metrics, checkpoints, the finished model; predicted beside measured at the end.

The run works in `OUTPUT.partial`, which becomes OUTPUT when everything is in it. An interrupted run leaves its last
checkpoint there and goes on from it.
"""

import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from brim.errors import RanOutOfMemoryError, Stopped, UsageError
from brim.memory.measured import RealMeter, meter_for
from brim.models import ModelSpec
from brim.publish import check_room, sync_tree, write_whole
from brim.recipe import Recipe
from brim.report import Measured, Prediction, RunReport
from brim.training.build import Workload, build
from brim.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from brim.training.data import DataSet
from brim.training.metrics import Metrics, StepRecord
from brim.training.schedule import learning_rate
from brim.training.step import train_step
from brim.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What to run and where."""

    recipe: Recipe
    spec: ModelSpec
    weights: Path
    """Directory in Hugging Face form."""
    tokenizer: Any
    data: DataSet
    output: Path
    predicted: Prediction
    device: str = "cpu"
    resume: bool = False

    @property
    def workplace(self) -> Path:
        return self.output.with_name(f"{self.output.name}.partial")


OnStep = Callable[[StepRecord], None]
ShouldStop = Callable[[], bool]


def run(job: Run, *, on_step: OnStep = lambda _: None, should_stop: ShouldStop = lambda: False) -> RunReport:
    """Train and publish OUTPUT. Between steps `should_stop` is asked: True saves and raises Stopped.

    Raises UsageError when OUTPUT is there already, DoesNotFitError when the disk lacks the room,
    RanOutOfMemoryError with the ledger when memory ends all the same.
    """
    _prepare_workplace(job)
    meter = meter_for(torch.device(job.device))
    try:
        with meter:
            torch.manual_seed(job.recipe.training.seed)
            workload = build(job.recipe, job.spec, weights=job.weights, device=job.device)
            _tell_classes(job, workload)
            if workload.head.chunked:
                workload.head.check_finish(workload.model, _few_tokens(job, workload))
            history = _train(job, workload, meter, on_step=on_step, should_stop=should_stop)
    except (RuntimeError, MemoryError) as error:
        _explain_out_of_memory(job, error)
        raise
    report = _report(job, history, meter)
    _publish(job, workload, report)
    return report


def _tell_classes(job: Run, workload: Workload) -> None:
    """The saved model names its classes, and finds the end of a row where the data put it."""
    if job.data.classes:
        workload.base.config.id2label = dict(enumerate(job.data.classes))
        workload.base.config.label2id = {name: number for number, name in enumerate(job.data.classes)}
        workload.base.config.pad_token_id = job.data.padding_id


@dataclass(slots=True)
class _History:
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


def _train(job: Run, workload: Workload, meter: RealMeter, *, on_step: OnStep, should_stop: ShouldStop) -> _History:
    steps, checkpoints = job.data.steps(job.recipe), job.workplace / "checkpoints"
    history = _History()
    if job.resume and (progress := load_checkpoint(checkpoints, workload)):
        history.losses = list(progress.losses)
    peak_bytes = meter.sample()[1]
    with Metrics(job.workplace, first_step=len(history.losses)) as metrics:
        for step in range(len(history.losses), steps):
            started = time.perf_counter()
            rate = learning_rate(job.recipe, step, steps)
            loss = float(train_step(workload, job.data.step_batches(job.recipe, step), learning_rate=rate))
            seconds = time.perf_counter() - started
            _, allocated_bytes = meter.sample()
            peak_bytes = max(peak_bytes, allocated_bytes)
            history.losses.append(loss)
            history.step_seconds.append(seconds)
            record = StepRecord(
                step=step + 1,
                steps=steps,
                loss=loss,
                learning_rate=rate,
                tokens_per_s=job.recipe.tokens_per_step / seconds,
                allocated_bytes=allocated_bytes,
                peak_bytes=peak_bytes,
                seconds_left=(steps - step - 1) * statistics.median(history.step_seconds),
            )
            metrics.write(record)
            on_step(record)
            _check_loss(loss, step + 1)
            stopping = should_stop() and step + 1 < steps
            every = job.recipe.training.save_every
            if stopping or (every and (step + 1) % every == 0 and step + 1 < steps):
                save_checkpoint(checkpoints, workload, Progress(steps_done=step + 1, losses=tuple(history.losses)))
            if stopping:
                raise Stopped(f"stopped after step {step + 1} of {steps}; go on with the same command and --resume")
    return history


def _check_loss(loss: float, step: int) -> None:
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise UsageError(
            f"the loss of step {step} is {loss}: the run has diverged; "
            "lower optimizer.learning_rate, or compute in fp32"
        )


def _few_tokens(job: Run, workload: Workload) -> dict[str, torch.Tensor]:
    """Enough of the data for one look at the logits."""
    batch = job.data.step_batches(job.recipe, 0)[0]
    inputs = {"input_ids": batch.input_ids[:1, :8].to(workload.device)}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if job.recipe.task == "seq2seq-lm":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def _prepare_workplace(job: Run) -> None:
    if job.output.exists():
        raise UsageError(f"{job.output} is there already; choose another --output, or move it away")
    # model or adapter, and a checkpoint with the optimizer's state beside it
    check_room(job.output, job.predicted.ledger.weights + 2 * job.predicted.ledger.optimizer, what="the run's output")
    if job.workplace.exists() and not job.resume:
        if (job.workplace / "checkpoints").exists():
            raise UsageError(
                f"{job.workplace} holds an interrupted run; go on with --resume, or remove it to start over"
            )
        shutil.rmtree(job.workplace)
    job.workplace.mkdir(parents=True, exist_ok=True)
    write_whole(job.workplace / "recipe.toml", job.recipe.to_toml())


def _report(job: Run, history: _History, meter: RealMeter) -> RunReport:
    later = history.step_seconds[1:] or history.step_seconds or [0.0]
    step_time_s = statistics.median(later)
    return RunReport(
        model=job.spec.name,
        recipe=job.recipe.to_dict(),
        steps=len(history.losses),
        first_loss=history.losses[0],
        last_loss=history.losses[-1],
        predicted=job.predicted,
        measured=Measured(
            peak=meter.peak,
            ledger=meter.ledger,
            step_time_s=step_time_s,
            tokens_per_s=job.recipe.tokens_per_step / step_time_s if step_time_s else 0.0,
            meter=meter.name,
        ),
        environment=environment(),
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


def _publish(job: Run, workload: Workload, report: RunReport) -> None:
    """Model (or adapter), tokenizer and report into the workplace, then the workplace into its final name."""
    workload.model.save_pretrained(job.workplace)  # type: ignore[operator]
    job.tokenizer.save_pretrained(job.workplace)
    write_whole(job.workplace / "report.json", json.dumps(report.to_dict(), indent=2))
    shutil.rmtree(job.workplace / "checkpoints", ignore_errors=True)
    sync_tree(job.workplace)
    job.workplace.rename(job.output)


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
