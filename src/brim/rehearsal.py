"""Recipe -> Prediction: the trainer's own builder and step, run on fake tensors under the meter of lifetimes.

Two steps are run: the optimizer's state appears in the first, the steady peak in the second.
"""

from brim.hardware import Device
from brim.memory import owners
from brim.memory.fake import FakeWorld
from brim.memory.trace import Trace
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.report import Peak, Prediction
from brim.speed import step_time
from brim.training.batches import synthetic_batch
from brim.training.build import build
from brim.training.step import train_step

ERROR_BAND = (-0.001, 0.001)
"""Held by the tests against the profiler's allocation peak, for every lever and family they build."""


def rehearse(spec: ModelSpec, recipe: Recipe, *, device: Device, budget_bytes: int) -> Prediction:
    """The ledger of exactly this recipe. Nothing is read or downloaded, and no weights exist."""
    trace = rehearse_trace(spec, recipe)
    seconds = step_time(spec, recipe, device)
    return Prediction(
        model=spec.name,
        recipe=recipe.to_dict(),
        device_name=device.name,
        budget_bytes=budget_bytes,
        peak=Peak(allocated_bytes=trace.peak_bytes),
        ledger=trace.peak_ledger(),
        step_time_s=seconds,
        tokens_per_s=recipe.tokens_per_step / seconds,
        method="rehearsal",
        error_band=ERROR_BAND,
        reasons=tuple(recipe.warnings()),
    )


def rehearse_trace(spec: ModelSpec, recipe: Recipe, *, steps: int = 2) -> Trace:
    """Every allocation and free of the build and of `steps` optimizer steps, by owner."""
    synthetic = [synthetic_batch(recipe, spec, seed=index) for index in range(recipe.grad_accumulation)]
    with FakeWorld() as world, owners.listening(world.meter):
        workload = build(recipe, spec)
        batches = [batch.mapped(world.bring) for batch in synthetic]
        for _ in range(steps):
            train_step(workload, batches, learning_rate=recipe.optimizer.learning_rate)
        return world.meter.trace
