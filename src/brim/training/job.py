"""What a run is given: what to run and where, and who watches it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.report import Prediction
from brim.training.dataset import DataSet
from brim.training.metrics import StepRecord
from brim.training.ranks import ALONE, Ranks


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
    cap_bytes: int | None = None
    """What this process's tensors may take, on a CPU; None: what there is."""


OnStep = Callable[[StepRecord], None]
ShouldStop = Callable[[], bool]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who is told and asked while a run goes."""

    on_step: OnStep = lambda _: None
    should_stop: ShouldStop = lambda: False
    """Asked before the first step, after each, and while the run waits."""
    tell: Tell = lambda _: None
    """Hears what a user should know at once: that the run waits for room, or went back."""
