"""When memory ends in spite of the prediction: the next recipe that learns the same, from the last checkpoint on."""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from brim.cli import console
from brim.errors import BrimError, RanOutOfMemoryError
from brim.recipe import Recipe
from brim.report import Prediction, RunReport

if TYPE_CHECKING:
    from brim.training.job import Run


def first_that_fits(
    job: "Run", run: Callable[["Run"], RunReport], predict: Callable[[Recipe], Prediction]
) -> RunReport:
    """The report of the run; where memory ends, that of the first lighter recipe with which it does not.

    Raises RanOutOfMemoryError with the ledger of that moment where there is none, or where several ranks would have to
    agree on one.
    """
    while True:
        try:
            return run(job)
        except RanOutOfMemoryError as error:
            found = None if job.ranks.count > 1 else _next(job, predict)
            if found is None:
                raise
            console.note(str(error))
        gc.collect()  # the model that was too large must be gone before the next is made
        changes = ", ".join(changed_settings(job.recipe, found.recipe))
        console.note(f"going on with {changes}: as many rows a step, and the same is learned")
        job = found


def _next(job: "Run", predict: Callable[[Recipe], Prediction]) -> "Run | None":
    """The same run by a recipe that is predicted to take less; None where there is none."""
    from brim.hardware.measure import resolve_device
    from brim.planning.lighter import lighter

    for recipe in lighter(job.recipe, resolve_device(job.device)):
        try:
            predicted = predict(recipe)
        except BrimError:
            continue
        if predicted.peak.highest_bytes < job.predicted.peak.highest_bytes:
            return replace(job, recipe=recipe, predicted=predicted, resume=True)
    return None


def changed_settings(before: Recipe, after: Recipe) -> list[str]:
    """`key=value` of each setting that is another one."""
    flat = [dict(_flat(recipe.to_dict())) for recipe in (before, after)]
    return [f"{key}={value}" for key, value in flat[1].items() if flat[0][key] != value]


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
