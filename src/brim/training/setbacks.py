"""A step whose loss is no number, or far above those before it: told, the end, or a step back without its rows.

Going back is to the newest checkpoint; the rows of the step that went wrong are left out, and those that follow move
up. What is left out is in the next checkpoint. Killed before that, a run meets the same loss again and does the same,
so it still ends as one that was left in peace.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

from brim.errors import UsageError
from brim.training.build import Workload
from brim.training.checkpoint import load_checkpoint, save_checkpoint, wrong_weight
from brim.training.history import History
from brim.training.job import Run, Watch
from brim.training.trouble import rows_read
from brim.training.workplace import can_resume, checkpoints_of

_WINDOW, _FEWEST = 100, 20
"""Losses that tell what is usual: the last so many, and none below so few."""
_TIMES, _SPREADS, _LEAST_RISE = 2.0, 6.0, 0.5
"""A spike is above so many times the median, so many spreads (as of a normal distribution, by the median deviation)
above it, and so much above it (in nats): each alone is met by runs that are well, the last by those that know their
data by heart."""
MOST_STEPS_BACK = 3
"""Rows of so many steps may be at fault; beyond, it is the recipe."""


def is_spike(losses: Sequence[float], loss: float) -> bool:
    """Whether the loss after these is far above them; False for what is no number."""
    recent = losses[-_WINDOW:]
    if len(recent) < _FEWEST:
        return False
    usual = statistics.median(recent)
    spread = 1.4826 * statistics.median(abs(other - usual) for other in recent)
    return loss > max(_TIMES * usual, usual + _SPREADS * spread, usual + _LEAST_RISE)


def batch_number(step: int, left_out: Iterable[int]) -> int:
    """Which of the data's batches (from 0) step `step` reads when these are left out."""
    number = step
    for other in sorted(left_out):
        number += other <= number
    return number


def goes_back(job: Run, workload: Workload, history: History, loss: float, watch: Watch) -> bool:
    """Whether the run is now as at its newest checkpoint, without the rows of the step whose loss this is.

    False: it goes on in spite of it. Raises UsageError where it is to end: what is no number cannot be gone on from.
    """
    step, asked = len(history.losses), job.recipe.training.on_spike
    number = batch_number(step, history.left_out)
    usual = f" ({statistics.median(history.losses[-_WINDOW:]):.4f} is usual)" if math.isfinite(loss) else ""
    said = f"the loss of step {step + 1} is {loss:.4f}{usual}, over {rows_read(job, number)}"
    if asked == "rollback" and len(history.left_out) < MOST_STEPS_BACK and job.ranks.any(can_resume(job.output)):
        # Where nothing clips, what is no number may come from the step before, which made the weights.
        doubtful = not math.isfinite(loss) and bool(wrong_weight(workload))
        progress = load_checkpoint(checkpoints_of(job.output), workload, data=job.data.fingerprint)
        assert progress is not None
        before = (batch_number(step - 1, history.left_out),) if doubtful and step > progress.steps_done else ()
        history.go_back(progress, without=(*before, number))
        watch.tell(f"{said}: going back to step {progress.steps_done}, and on without those rows{_also(before)}")
        return True
    if asked == "tell" and math.isfinite(loss):
        watch.tell(said)
        return False
    _keep(job, workload, history, loss)
    kept = f"{checkpoints_of(job.output)} holds what was learned" if can_resume(job.output) else "nothing is kept"
    raise UsageError(f"{said}: {_advice(history, loss)}; {kept}; {_WAYS_OUT}")


_WAYS_OUT = (
    "lower optimizer.learning_rate, compute in fp32, or look at those rows; with training.save_every, "
    'training.on_spike = "rollback" goes back and on without them'
)


def _also(before: tuple[int, ...]) -> str:
    return " and those of the step before" if before else ""


def _advice(history: History, loss: float) -> str:
    if history.left_out:
        return f"it is not the rows alone, for those of {len(history.left_out)} steps were left out"
    return "it is far above those before it" if math.isfinite(loss) else "the run has diverged"


def _keep(job: Run, workload: Workload, history: History, loss: float) -> None:
    """A checkpoint of what was learned, where that is good: before what is no number, and after a spike if there is
    none from before it."""
    if math.isfinite(loss):
        if job.ranks.any(can_resume(job.output)):
            return
        history.add(loss, 0.0)
    if history.losses and not wrong_weight(workload):
        save_checkpoint(checkpoints_of(job.output), workload, history.progress(), data=job.data.fingerprint)


def told_of(job: Run, history: History) -> list[str]:
    """For the report: which rows were left out."""
    return [f"left out after a setback: {rows_read(job, number)}" for number in history.left_out]
