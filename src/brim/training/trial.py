"""A recipe's first steps run for real with random weights: what its rehearsal is held against."""

import gc
from collections.abc import Callable

import torch

from brim.memory.measured import CpuMeter
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.training.batches import synthetic_batch
from brim.training.build import Workload, build
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
