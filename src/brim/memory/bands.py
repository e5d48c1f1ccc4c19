"""How far predictions for GPUs were from published peaks, and the band that follows. No torch.

The errors are those of `make accuracy` (data/gpu_errors.csv), by kind of run: what is trained, whose model code ran,
whether it is sharded, and then its task.
"""

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources

from brim.errors import UsageError
from brim.recipe import Recipe

DEFAULT_RISK = 0.02
_FEWEST = 5
"""Rows of a kind; with fewer, those of the wider kind are asked."""

Errors = Mapping[str, Sequence[float]]
"""Kind of run -> measured / predicted - 1."""


def gpu_band(recipe: Recipe, *, risk: float = DEFAULT_RISK, inference: bool = False) -> tuple[float, float]:
    """Relative (low, high): at most this share of published rows of the kind lie above their upper bound.

    And as many below the lower. The band always holds 0: few rows say little.
    Raises UsageError for a risk out of range.
    """
    if not 0 <= risk < 0.5:
        raise UsageError(f"--risk {risk} is not a share from 0 to 0.5; write for example 0.02")
    return band(_errors(), kind_of_run(recipe, inference=inference), risk=risk)


def band(learned: Errors, kind: str, *, risk: float) -> tuple[float, float]:
    """The same, learned from these errors."""
    errors = sorted(_errors_of(learned, kind))
    outside = int(risk * len(errors))
    return min(0.0, errors[outside]), max(0.0, errors[-1 - outside])


def _errors_of(learned: Errors, kind: str) -> Sequence[float]:
    """The kind's own, else those of the narrowest wider kind with enough; a wide kind holds its narrow ones."""
    found = learned.get(kind, ())
    while len(found) < _FEWEST and kind:
        kind = kind.rpartition(", ")[0]
        found = [error for name, some in learned.items() if name.startswith(kind) for error in some]
    return found


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
def _errors() -> Errors:
    text = resources.files("brim.memory").joinpath("data", "gpu_errors.csv").read_text(encoding="utf-8")
    found: dict[str, list[float]] = {}
    for row in csv.DictReader(text.splitlines()):
        found.setdefault(row["kind_of_run"], []).append(float(row["error"]))
    return found
