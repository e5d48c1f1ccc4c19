"""What a run did and measured so far, by this process and by those that it goes on from."""

from dataclasses import dataclass, field

from brim.memory.measured import RealMeter
from brim.report import Ledger, Peak
from brim.training.checkpoint import Progress


@dataclass(slots=True)
class History:
    """Grows with each step."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    peak: Peak = field(default_factory=lambda: Peak(allocated_bytes=0))
    ledger: Ledger = field(default_factory=Ledger)
    eval_loss: float | None = None
    meter_name: str = ""
    left_out: tuple[int, ...] = ()
    """Of the data's batches, those that are not read (training/setbacks.py)."""

    def measure(self, meter: RealMeter) -> tuple[int, int]:
        """(allocated bytes now, highest since the last time); keeps the peak of all."""
        sample = meter.sample()
        self.meter_name = meter.name
        if meter.peak.allocated_bytes > self.peak.allocated_bytes:
            self.peak, self.ledger = meter.peak, meter.ledger
        return sample

    def add(self, loss: float, seconds: float) -> None:
        """A step was done."""
        self.losses.append(loss)
        self.step_seconds.append(seconds)

    def go_back(self, progress: Progress, *, without: tuple[int, ...]) -> None:
        """To a checkpoint, leaving out more batches; what was measured stays."""
        self.losses, self.step_seconds = list(progress.losses), list(progress.step_seconds)
        self.left_out = (*self.left_out, *without)

    def progress(self) -> Progress:
        return Progress(
            losses=tuple(self.losses),
            step_seconds=tuple(self.step_seconds),
            peak=self.peak,
            ledger=self.ledger,
            left_out=self.left_out,
        )

    @classmethod
    def of(cls, progress: Progress | None) -> "History":
        """That of a checkpoint; an empty one for None."""
        if progress is None:
            return cls()
        return cls(
            losses=list(progress.losses),
            step_seconds=list(progress.step_seconds),
            peak=progress.peak,
            ledger=progress.ledger,
            left_out=progress.left_out,
        )
