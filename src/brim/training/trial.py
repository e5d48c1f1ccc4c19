"""A recipe's first steps run for real with random weights: what its rehearsal is held against."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel

from brim.memory.measured import CpuMeter
from brim.models import ModelSpec
from brim.models.skeleton import skeleton
from brim.recipe import Recipe
from brim.report import Ledger, Peak
from brim.training.batches import synthetic_batch
from brim.training.build import Workload, build
from brim.training.checkpoint import Progress, save_checkpoint, wrong_weight
from brim.training.evaluation import loss_over
from brim.training.merge import write_merged
from brim.training.step import train_step


def run_trial(
    spec: ModelSpec, recipe: Recipe, *, steps: int = 2, prepare: Callable[[Workload], None] = lambda _: None
) -> None:
    """Build with random weights of a fixed seed, `prepare`, and take so many optimizer steps on a CPU."""
    torch.manual_seed(0)
    workload = build(recipe, spec)
    if workload.loss_scale is not None:
        workload.loss_scale.value = 1.0  # as in a run that has found its scale: no step is skipped
    prepare(workload)
    batches = [synthetic_batch(recipe, spec, seed=index) for index in range(recipe.grad_accumulation)]
    for _ in range(steps):
        train_step(workload, batches, learning_rate=1e-4)


def measured_trial(
    spec: ModelSpec, recipe: Recipe, *, steps: int = 2, prepare: Callable[[Workload], None] = lambda _: None
) -> CpuMeter:
    """`run_trial` under the meter that adds up the allocator's events; it holds peak and ledger."""
    gc.collect()  # what earlier trials left in cycles is not to be freed under the meter
    with CpuMeter() as meter:
        run_trial(spec, recipe, steps=steps, prepare=prepare)
        meter.sample()
    return meter


def measured_moments(spec: ModelSpec, recipe: Recipe, place: Path) -> tuple[dict[str, int], int]:
    """(moment of a run -> highest allocated bytes, highest while the model was loaded), all in this directory.

    The last moment is `merging` where the recipe adapts, else `publishing`.
    """
    skeleton(spec, dtype="fp32", attention="sdpa").save_pretrained(place / "model")
    gc.collect()  # as above
    peaks: dict[str, int] = {}
    with CpuMeter() as meter:
        batches = [synthetic_batch(recipe, spec, seed=index) for index in range(recipe.grad_accumulation)]
        workload = build(recipe, spec, weights=place / "model")
        meter.sample()
        highest = meter.peak.allocated_bytes

        def moment(name: str, work: Callable[[], object]) -> None:
            meter.start_over()
            work()
            meter.sample()
            peaks[name] = meter.peak.allocated_bytes

        moment("loading", lambda: None)
        moment("first step", lambda: train_step(workload, batches, learning_rate=1e-4))
        moment("later steps", lambda: train_step(workload, batches, learning_rate=1e-4))
        moment("evaluation", lambda: loss_over(workload, batches[:1]))
        moment("saving", lambda: _save(workload, place))
        moment("merging" if recipe.adapts else "publishing", lambda: _publish(workload, place))
    return peaks, highest


def _save(workload: Workload, place: Path) -> None:
    progress = Progress(losses=(1.0,), step_seconds=(1.0,), peak=Peak(allocated_bytes=0), ledger=Ledger())
    assert not wrong_weight(workload)
    save_checkpoint(place / "checkpoints", workload, progress, data="these")


def _publish(workload: Workload, place: Path) -> None:
    (place / "whole").mkdir()
    if isinstance(workload.model, PeftModel):
        write_merged(workload.model, place / "whole")
    else:
        workload.base.save_pretrained(place / "whole")
