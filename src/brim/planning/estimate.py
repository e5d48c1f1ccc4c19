"""A recipe's prediction by closed form: microseconds, no torch, a wide band."""

from dataclasses import replace

from brim.hardware.device import Device
from brim.memory import closed_form, rough, sharded
from brim.memory.bands import DEFAULT_RISK, gpu_band
from brim.memory.constants import context_bytes, cublas_workspace_bytes
from brim.memory.offloaded import split
from brim.models.spec import ModelSpec
from brim.recipe import Recipe
from brim.report import Ledger, Peak, Prediction
from brim.speed.bands import roofline_basis, time_range
from brim.speed.roofline import step_time, tokens_per_s
from brim.units import format_bytes


def estimate(
    spec: ModelSpec, recipe: Recipe, *, device: Device, budget_bytes: int, risk: float = DEFAULT_RISK
) -> Prediction:
    """Peak and step time without running anything; roughly where the closed form does not know the family or head."""
    found, (low, high) = _moments(spec, recipe)
    least, most = published_band(spec, recipe, device, risk)
    reasons: tuple[str, ...] = ()
    if not rough.closed_form_knows(spec, recipe):
        reasons = (f"rough: no closed form for {spec.model_type}, {recipe.task}; a rehearsal is exact",)
    on_gpu = device.kind == "cuda"
    apart = [split(moment, spec, recipe) if on_gpu else (moment, 0) for moment in found]
    ledger, _ = max(apart, key=lambda pair: pair[0].total)
    host_bytes = max(nbytes for _, nbytes in apart) if on_gpu and recipe.memory.offload != "none" else None
    if on_gpu:
        handles = 2 * cublas_workspace_bytes(device)  # forward's thread and backward's
        ledger = replace(ledger, workspace=ledger.workspace + handles, context=context_bytes(device))
    seconds = step_time(spec, recipe, device)
    return Prediction(
        model=spec.name,
        recipe=recipe.to_dict(),
        device_name=device.name,
        budget_bytes=budget_bytes,
        peak=Peak(
            allocated_bytes=ledger.total - ledger.context,
            device_bytes=ledger.total if on_gpu else None,
            host_bytes=host_bytes,
        ),
        ledger=ledger,
        step_time_s=seconds,
        step_time_range_s=time_range(seconds, basis=roofline_basis(device), identity=device.identity),
        step_time_basis=roofline_basis(device),
        tokens_per_s=tokens_per_s(recipe, seconds),
        method="closed-form",
        error_band=((1 + low) * (1 + least) - 1, (1 + high) * (1 + most) - 1),
        reasons=reasons,
    )


def _moments(spec: ModelSpec, recipe: Recipe) -> tuple[list[Ledger], tuple[float, float]]:
    """What the busiest device's tensors are at each moment that can be the peak, and how far off that may be."""
    divided = recipe.parallel.data_ranks > 1 and not recipe.parallel.copies_weights
    # the closed form of a sharded step knows no packed base
    if not rough.closed_form_knows(spec, recipe) or (divided and recipe.precision.packed):
        found = rough.rough(spec, recipe)
        many = recipe.parallel.data_ranks > 1
        return [sharded.divided(found, spec, recipe) if many else found], rough.ERROR_BAND
    if divided:
        return list(sharded.sharded_moments(spec, recipe).values()), sharded.ERROR_BAND
    if recipe.parallel.data_ranks > 1:
        return [sharded.copied(spec, recipe)], sharded.ERROR_BAND
    return list(closed_form.moments(spec, recipe).values()), closed_form.ERROR_BAND


def published_band(spec: ModelSpec, recipe: Recipe, device: Device, risk: float) -> tuple[float, float]:
    """How far peaks on a device may be from a rehearsal's, relative; nothing on a CPU."""
    return (0.0, 0.0) if device.kind == "cpu" else gpu_band(recipe, spec.model_type, risk=risk)


def lower_bound(prediction: Prediction) -> int:
    """Bytes: the least that the peak may turn out to be."""
    return int(prediction.peak.highest_bytes * (1 + prediction.error_band[0]))


def upper_bound(prediction: Prediction) -> int:
    """Bytes: the most that the peak may turn out to be; what `fits` compares with the budget."""
    return int(prediction.peak.highest_bytes * (1 + prediction.error_band[1])) + 1


def excess(prediction: Prediction) -> str:
    """`needs 26.1 GiB, 2.10 GiB over: activations 12.4 GiB, weights 7.0 GiB`: why it does not fit."""
    needed = prediction.peak.highest_bytes
    low, high = prediction.error_band
    over = needed - prediction.budget_bytes
    if over > 0:
        verdict = f"needs {format_bytes(needed)}, {format_bytes(over)} over"
    else:
        verdict = f"needs {format_bytes(needed)} ({100 * low:+.3g} to {100 * high:+.3g} %), which may be over"
    return f"{verdict}: {largest_lines(prediction.ledger)}"


def largest_lines(ledger: Ledger, *, count: int = 2) -> str:
    """`activations 12.4 GiB, weights 7.0 GiB`."""
    lines = sorted(ledger.to_dict().items(), key=lambda line: -line[1])
    return ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in lines[:count])
