"""How far predictions for GPUs were from published peaks, and the band that follows. No torch.

The errors are those of `make accuracy` (data/gpu_errors.csv), by kind of run: what is trained, whose model code ran,
whether it is sharded, and then its task. A bound has to hold for runs of a source that nobody has seen: it is that of
the source that fared worst, in the narrowest kind of which several sources say what the card held (reserved,
nvidia-smi): what lives on it says nothing of segments and context. Each counter of a source counts apart.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from brim.errors import UsageError
from brim.recipe import Recipe

DEFAULT_RISK = 0.02
_FEWEST_ROWS = 5
_FEWEST_SOURCES = 2
"""Of a kind; with fewer, those of the wider kind are asked."""
_HELD = ("reserved", "nvidia-smi")


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """One published row."""

    kind_of_run: str
    counter: str
    """What was read: allocated, active, reserved or nvidia-smi."""
    source: str
    excess: float
    """measured / predicted - 1."""

    @property
    def is_held(self) -> bool:
        """The counter is of what the card holds."""
        return self.counter in _HELD


def gpu_band(recipe: Recipe, *, risk: float = DEFAULT_RISK, inference: bool = False) -> tuple[float, float]:
    """Relative (low, high): at most this share of the rows of any source and counter lie above the upper bound.

    And as many below the lower. The band always holds 0: few rows say little.
    Raises UsageError for a risk out of range.
    """
    if not 0 <= risk < 0.5:
        raise UsageError(f"--risk {risk} is not a share from 0 to 0.5; write for example 0.02")
    return _learned_band(kind_of_run(recipe, inference=inference), risk)


@cache
def _learned_band(kind: str, risk: float) -> tuple[float, float]:
    return band(_errors(), kind, risk=risk)


def band(learned: Iterable[Excess], kind: str, *, risk: float) -> tuple[float, float]:
    """The same, learned from these errors."""
    apart: dict[tuple[str, str], list[float]] = {}
    for row in _told(list(learned), kind):
        apart.setdefault((row.source, row.counter), []).append(row.excess)
    lows, highs = [0.0], [0.0]
    for errors in map(sorted, apart.values()):
        outside = int(risk * len(errors))
        lows.append(errors[outside])
        highs.append(errors[-1 - outside])
    return min(lows), max(highs)


def _told(learned: Sequence[Excess], kind: str) -> Sequence[Excess]:
    """Rows of the kind itself or of the narrowest wider kind with enough; a wide kind holds its narrow ones.

    A method of which nobody says what the card held is alone with its few.
    """
    method = kind.partition(", ")[0]
    seen_held = any(row.is_held and row.kind_of_run.startswith(method) for row in learned)
    found = [row for row in learned if row.kind_of_run == kind]
    while kind and not _are_enough([row for row in found if row.is_held] if seen_held else found):
        kind = kind.rpartition(", ")[0]
        found = [row for row in learned if row.kind_of_run.startswith(kind)]
    return found


def _are_enough(rows: Sequence[Excess]) -> bool:
    return len(rows) >= _FEWEST_ROWS and len({row.source for row in rows}) >= _FEWEST_SOURCES


def kind_of_run(recipe: Recipe, *, inference: bool = False) -> str:
    """`full, transformers`: what the errors are sorted by."""
    code = "litgpt" if recipe.library.has_litgpt_loss else "transformers"
    method = "packed" if recipe.precision.packed else "full" if recipe.trains_weights else "lora"
    kind = ["inference" if inference else method, code]
    if recipe.parallel.sharding != "none":
        kind.append("sharded")
    if recipe.task != "causal-lm":
        kind.append(recipe.task)
    return ", ".join(kind)


@cache
def _errors() -> tuple[Excess, ...]:
    text = resources.files("brim.memory").joinpath("data", "gpu_errors.csv").read_text(encoding="utf-8")
    return tuple(
        Excess(kind_of_run=row["kind_of_run"], counter=row["kind"], source=row["source"], excess=float(row["error"]))
        for row in csv.DictReader(text.splitlines())
    )
