"""What a run tells while it goes: a record a step, kept as metrics.jsonl and as TensorBoard events."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter

from brim.publish import write_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What is known after a step."""

    step: int
    """From 1."""
    steps: int
    loss: float
    learning_rate: float
    tokens_per_s: float
    allocated_bytes: int
    """Highest of this step."""
    peak_bytes: int
    """Highest of the run so far."""
    seconds_left: float
    eval_loss: float | None = None
    """Mean loss on the evaluation data, where it was measured after this step."""
    loss_scale: float | None = None
    """Of the next step, where the recipe computes in FP16."""
    skipped: bool = False
    """A gradient overflowed, so the weights stayed as they were."""


class Metrics:
    """metrics.jsonl, a line a step, and TensorBoard's events beside it."""

    def __init__(self, directory: Path, *, first_step: int) -> None:
        self._path = directory / "metrics.jsonl"
        self._directory = directory
        self._first_step = first_step
        self._file: TextIO | None = None
        self._events: SummaryWriter | None = None

    def __enter__(self) -> "Metrics":
        self.go_back(self._first_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def go_back(self, steps: int) -> None:
        """To what was written of the first `steps`; lines past them belong to steps that are run again."""
        self.close()
        kept = self._path.read_text(encoding="utf-8").splitlines()[:steps] if self._path.exists() else []
        write_whole(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(self._directory / "events"), purge_step=steps + 1)

    def write(self, record: StepRecord) -> None:
        """Raises OSError when the disk is full; the same record can then be written again."""
        if self._file is None:
            self.go_back(record.step - 1)
        try:
            self._write(record)
        except OSError:
            self.close()  # half a line may be in it
            raise

    def close(self) -> None:
        """What is written next decides which lines before it stay."""
        for open_file in (self._file, self._events):
            if open_file is not None:
                with suppress(OSError):  # what a full disk does not take is written anew
                    open_file.close()
        self._file = self._events = None

    def _write(self, record: StepRecord) -> None:
        assert self._file is not None and self._events is not None
        values = {
            "loss": record.loss,
            "learning_rate": record.learning_rate,
            "tokens_per_s": record.tokens_per_s,
            "allocated_bytes": record.allocated_bytes,
        }
        if record.eval_loss is not None:
            values["eval_loss"] = record.eval_loss
        if record.loss_scale is not None:
            values |= {"loss_scale": record.loss_scale, "skipped": float(record.skipped)}
        self._file.write(json.dumps({"step": record.step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, record.step)
