"""What a run that cannot go on says: which step, which rows, what is kept, what to do."""

import math

from brim.errors import RanOutOfMemoryError, Stopped, UsageError
from brim.memory.measured import RealMeter
from brim.report import Ledger, Peak
from brim.training.build import Workload
from brim.training.checkpoint import wrong_weight
from brim.training.history import History
from brim.training.job import Run
from brim.units import format_bytes

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""In what gloo and NCCL say when a process that they wait for is gone."""
_NAMED_ROWS = 16


def rows_read(job: Run, batch: int) -> str:
    """The rows of the data set (from 1) in a step's batch (from 0), with file and line where known."""
    rows = job.data.step_rows(job.recipe, batch)
    named = ", ".join(str(row + 1) for row in rows[:_NAMED_ROWS]) + (", ..." if len(rows) > _NAMED_ROWS else "")
    places = job.data.places_of(rows)
    read = f" ({'; '.join(places[:_NAMED_ROWS])}{'; ...' if len(places) > _NAMED_ROWS else ''})" if places else ""
    return f"rows {named} of the {len(job.data)} that the data makes{read}"


def check_number(value: float, subject: str) -> None:
    """Raises UsageError when it is none."""
    if not math.isfinite(value):
        raise UsageError(
            f"{subject} is {value}: the run has diverged; lower optimizer.learning_rate, or compute in fp32"
        )


def check_weights(workload: Workload, step: int) -> None:
    """Raises UsageError when a gradient that was no number has reached the weights (the loss shows it a step later)."""
    if name := wrong_weight(workload):
        check_number(math.nan, f"a weight of {name} after step {step}")


def explain_lost_rank(job: Run, error: BaseException) -> None:
    """Raises Stopped when another process of the run has ended, which is the one that knows why."""
    if job.ranks.count > 1 and any(words in str(error) for words in _LOST):
        raise Stopped("another rank has ended; go on with the same command and --resume") from error


def explain_out_of_memory(job: Run, meter: RealMeter, error: BaseException) -> None:
    """Raises RanOutOfMemoryError when that is what happened, with what there was at that moment."""
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        raise RanOutOfMemoryError(
            f"out of memory with {_told(meter.peak, meter.ledger)}; predicted was "
            f"{_told(job.predicted.peak, job.predicted.ledger)}; plan again with a smaller --memory, and see that "
            "nothing else fills the machine"
        ) from error


def check_cap(job: Run, history: History) -> None:
    """Raises RanOutOfMemoryError when a step's tensors took more than they may."""
    if job.cap_bytes is not None and job.device == "cpu" and history.peak.allocated_bytes > job.cap_bytes:
        predicted = _told(job.predicted.peak, job.predicted.ledger)
        raise RanOutOfMemoryError(
            f"step {len(history.losses)} took {_told(history.peak, history.ledger)}, more than the "
            f"{format_bytes(job.cap_bytes)} that it may; predicted was {predicted}"
        )


def _told(peak: Peak, ledger: Ledger) -> str:
    lines = ", ".join(f"{line} {format_bytes(size)}" for line, size in ledger.to_dict().items() if size)
    return f"{format_bytes(peak.allocated_bytes)} allocated ({lines})"
