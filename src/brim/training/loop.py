"""Run a recipe: steps, metrics, checkpoints, the finished model; predicted beside measured at the end.

The run works in `OUTPUT.partial` (`workplace`), which becomes OUTPUT when everything is in it. An interrupted run
leaves its last checkpoint there and goes on from it.
"""

import math
import statistics
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial

import torch
from safetensors import SafetensorError

from brim.errors import BrimError, Stopped, UsageError
from brim.memory.cap import walled
from brim.memory.measured import RealMeter, meter_for
from brim.publish import alone, write_whole
from brim.report import RunReport
from brim.training.build import Workload, build
from brim.training.checkpoint import kept, load_checkpoint, save_checkpoint, wrong_weight
from brim.training.dataset import DataSet
from brim.training.ending import publish_model, report_of
from brim.training.evaluation import mean_loss
from brim.training.history import History
from brim.training.job import OnStep, Run, ShouldStop, Tell, Watch
from brim.training.metrics import Metrics, StepRecord
from brim.training.packing import check_apart
from brim.training.room import with_room
from brim.training.rounding_start import begin_rounding, set_rounding
from brim.training.schedule import learning_rate
from brim.training.setbacks import batch_number, goes_back, is_spike
from brim.training.step import train_step
from brim.training.teacher import TEACHER_BYTES, taught
from brim.training.trouble import check_cap, check_number, check_weights, explain_lost_rank, explain_out_of_memory
from brim.training.workplace import checkpoints_of, discard_unbegun, hidden_of, open_workplace, workplace_of

_RECENT_STEPS = 100
"""As many steps tell how long the rest will take."""
_METRICS_BYTES = 2**20
"""Room to ask for when a line of metrics finds none."""


def run(
    job: Run,
    *,
    on_step: OnStep = lambda _: None,
    should_stop: ShouldStop = lambda: False,
    tell: Tell = lambda _: None,
) -> RunReport:
    """Train and publish OUTPUT. After each step `should_stop` is asked: True saves and raises Stopped. A full disk is
    told, and waited for.

    With `resume` and nothing to go on from, the run starts at its beginning. Raises UsageError when OUTPUT is there
    already, another run works on it or the loss is no number, DoesNotFitError when the disk lacks the room from the
    start, RanOutOfMemoryError with the ledger when memory ends all the same.

    Of several ranks the first alone writes and tells; a stop that one is asked for stops all.
    """
    if not job.ranks.is_first:
        return _run(job, Watch(should_stop=should_stop))
    with alone(job.output):
        open_workplace(job.output, job.recipe, job.predicted.ledger, resume=job.resume)
        try:
            return _run(job, Watch(on_step=on_step, should_stop=should_stop, tell=tell))
        finally:
            discard_unbegun(job.output)


def _run(job: Run, watch: Watch) -> RunReport:
    meter = meter_for(torch.device(job.device))
    try:
        with meter:
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
                job = replace(job, data=_taught(job, workload, watch))
            if job.recipe.calibrates and job.recipe.qat.train != "all":
                # of a run that goes on, too: checkpoints do not hold weights that are not trained
                scratch = hidden_of(job.output, job.ranks.data_rank)
                room_bytes = _room_bytes(job, History(), meter)
                begin_rounding(workload, job.data, scratch=scratch, room_bytes=room_bytes)
            history = _resumed(job, workload)
            _train(job, workload, history, meter, watch)
        report = report_of(job, history)
        _publish(job, workload, history, report, watch)
    except BrimError:
        raise
    except (RuntimeError, MemoryError) as error:
        explain_out_of_memory(job, meter, error)
        explain_lost_rank(job, error)
        raise
    return report


def _tell_classes(job: Run, workload: Workload) -> None:
    """The saved model names its classes, and finds the end of a row where the data put it."""
    if job.data.classes:
        workload.base.config.id2label = dict(enumerate(job.data.classes))
        workload.base.config.label2id = {name: number for number, name in enumerate(job.data.classes)}
        workload.base.config.pad_token_id = job.data.padding_id


def _taught(job: Run, workload: Workload, watch: Watch) -> DataSet:
    """The data with what the teacher says, once the disk has room for it."""
    return with_room(
        lambda: taught(workload, job.data, checkpoints_of(job.output)),
        output=job.output,
        what="what the teacher says",
        need_bytes=TEACHER_BYTES * job.recipe.qat.teacher_top * job.data.input_ids.numel(),
        watch=watch,
        ranks=job.ranks,
    )


def _room_bytes(job: Run, history: History, meter: RealMeter) -> int | None:
    allocated_bytes, _ = history.measure(meter)
    return None if job.cap_bytes is None else job.cap_bytes - allocated_bytes


def _resumed(job: Run, workload: Workload) -> History:
    """An empty history; after a resume that of the checkpoint, which is now in the workload."""
    if not job.resume:
        return History()
    progress = load_checkpoint(checkpoints_of(job.output), workload, data=job.data.fingerprint)
    if progress is not None and job.ranks.is_first:
        write_whole(workplace_of(job.output) / "recipe.toml", job.recipe.to_toml())
    return History.of(progress)


def _train(job: Run, workload: Workload, history: History, meter: RealMeter, watch: Watch) -> None:
    steps = job.data.steps(job.recipe)
    # Loading maps the weights' file, which the profiler counts; it is page cache, not memory that the run needs.
    meter.start_over()
    allocated_bytes, _ = history.measure(meter)
    if job.ranks.any(watch.should_stop()):
        raise Stopped("stopped before the first step; start again with the same command and --resume")
    cap_bytes = job.cap_bytes if job.device == "cpu" else None
    with walled(cap_bytes, allocated_bytes=allocated_bytes):
        _train_steps(job, workload, history, meter, watch, steps)
        if job.held is not None and history.eval_loss is None:
            history.eval_loss = mean_loss(workload, job.held)
    check_weights(workload, steps)


def _train_steps(job: Run, workload: Workload, history: History, meter: RealMeter, watch: Watch, steps: int) -> None:
    training, first_step = job.recipe.training, len(history.losses)
    with Metrics(workplace_of(job.output), first_step=first_step) if job.ranks.is_first else nullcontext() as metrics:
        while (step := len(history.losses)) < steps:
            last = step + 1 == steps
            if job.recipe.method == "qat":
                scratch = hidden_of(job.output, job.ranks.data_rank)
                room_bytes = partial(_room_bytes, job, history, meter)
                set_rounding(workload, job.data, step, steps, scratch=scratch, room_bytes=room_bytes)
            if not _step(job, workload, history, steps, watch):
                if metrics is not None:
                    metrics.close()
                continue
            record = _record(job, workload, history, meter, steps)
            _keep_record(job, metrics, record, watch)
            watch.on_step(record)
            stopping = job.ranks.any(watch.should_stop()) and not last
            due = training.save_every and (step + 1) % training.save_every == 0 and not last
            # Weights that are no numbers are no place to go back to: the next step's loss shows them.
            if stopping or (due and not (training.on_spike == "rollback" and wrong_weight(workload))):
                _save(job, workload, history, watch)
            if stopping:
                raise Stopped(f"stopped after step {step + 1} of {steps}; go on with the same command and --resume")


def _step(job: Run, workload: Workload, history: History, steps: int, watch: Watch) -> bool:
    """Whether the step counts: False where its loss sent the run back to a checkpoint."""
    step, started = len(history.losses), time.perf_counter()
    rate = learning_rate(job.recipe, step, steps)
    number = batch_number(step, history.left_out)
    batches = job.data.step_batches(job.recipe, number, data_rank=job.ranks.data_rank)
    loss = float(train_step(workload, batches, learning_rate=rate))
    is_bad = not math.isfinite(loss) or is_spike(history.losses, loss)
    if is_bad and goes_back(job, workload, history, loss, watch):
        return False
    history.add(loss, time.perf_counter() - started)
    if workload.loss_scale is not None and workload.loss_scale.exhausted:
        raise UsageError(
            f"gradients of step {step + 1} overflow FP16 at every loss scale down to 1: the run has diverged, or the "
            'model needs a wider range; take precision.weights = "bf16" and precision.compute = "bf16"'
        )
    return True


def _record(job: Run, workload: Workload, history: History, meter: RealMeter, steps: int) -> StepRecord:
    """What is known after the step that was just done; evaluates when it is time to."""
    step, training, scale = len(history.losses), job.recipe.training, workload.loss_scale
    _, allocated_bytes = history.measure(meter)
    check_cap(job, history)
    allocated_bytes, peak_bytes = job.ranks.highest(allocated_bytes, history.peak.allocated_bytes)
    history.eval_loss = None
    if job.held is not None and (step == steps or (training.evaluate_every and step % training.evaluate_every == 0)):
        history.eval_loss = mean_loss(workload, job.held)
        check_number(history.eval_loss, f"the evaluation loss after step {step}")
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


def _keep_record(job: Run, metrics: Metrics | None, record: StepRecord, watch: Watch) -> None:
    def write() -> None:
        job.ranks.together(lambda: metrics.write(record) if metrics is not None else None)

    with_room(write, output=job.output, what="metrics.jsonl", need_bytes=_METRICS_BYTES, watch=watch, ranks=job.ranks)


def _save(job: Run, workload: Workload, history: History, watch: Watch) -> None:
    """A checkpoint, once the disk has room for it."""
    check_weights(workload, len(history.losses))
    need_bytes = job.ranks.count * sum(tensor.nbytes for part in kept(workload) for tensor in part.values())
    with_room(
        lambda: _write_checkpoint(job, workload, history),
        output=job.output,
        what=f"the checkpoint of step {len(history.losses)}",
        need_bytes=need_bytes,
        watch=watch,
        ranks=job.ranks,
    )


def _write_checkpoint(job: Run, workload: Workload, history: History) -> None:
    save_checkpoint(checkpoints_of(job.output), workload, history.progress(), data=job.data.fingerprint)


def _few_tokens(job: Run, workload: Workload) -> dict[str, torch.Tensor]:
    """Enough of the data for one look at the logits."""
    batch = job.data.step_batches(job.recipe, 0, data_rank=job.ranks.data_rank)[0]
    inputs = {"input_ids": batch.input_ids[:1, :8].to(workload.device)}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if job.recipe.task == "seq2seq-lm":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def _publish(job: Run, workload: Workload, history: History, report: RunReport, watch: Watch) -> None:
    """The model, once the disk has room for it; until then what was learned is saved, if there is room for that."""

    def write() -> None:
        try:
            publish_model(job, workload, report)
        except (OSError, SafetensorError):
            with suppress(OSError, SafetensorError):
                _write_checkpoint(job, workload, history)
            raise

    written = workload.trainable if job.recipe.adapts else dict(workload.base.named_parameters())
    need_bytes = sum(parameter.nbytes for parameter in written.values())
    with_room(write, output=job.output, what="the model", need_bytes=need_bytes, watch=watch, ranks=job.ranks)
