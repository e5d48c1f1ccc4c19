"""A recipe's prediction by closed form: microseconds, no torch, a wide band."""

from dataclasses import replace

from brim.hardware.device import Device
from brim.memory import closed_form, rough, sharded
from brim.memory.bands import DEFAULT_RISK, gpu_band
from brim.memory.constants import context_bytes, cublas_workspace_bytes
from brim.memory.offloaded import split
from brim.memory.tensor import whole_of
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
    ledger, host_bytes = on_device(spec, recipe, device)
    low, high = closed_form_band(spec, recipe)
    least, most = published_band(spec, recipe, device, risk)
    reasons: tuple[str, ...] = ()
    if not rough.closed_form_knows(spec, recipe):
        reasons = (f"rough: no closed form for {spec.model_type}, {recipe.task}; a rehearsal is exact",)
    on_gpu = device.kind == "cuda"
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


def on_device(spec: ModelSpec, recipe: Recipe, device: Device) -> tuple[Ledger, int | None]:
    """The busiest device's tensors at their peak; and bytes on its host, where something is offloaded."""
    found = _moments(spec, recipe)
    if device.kind != "cuda" or recipe.memory.offload == "none":
        return max(found, key=lambda ledger: ledger.total), None
    apart = [split(moment, spec, recipe) for moment in found]
    return max((ledger for ledger, _ in apart), key=lambda ledger: ledger.total), max(nbytes for _, nbytes in apart)


def _moments(spec: ModelSpec, recipe: Recipe) -> list[Ledger]:
    """What the busiest device's tensors are at each moment that can be the peak."""
    is_rough = closed_form_band(spec, recipe) == rough.ERROR_BAND
    spec, recipe = whole_of(spec, recipe)
    if is_rough:
        found = rough.rough(spec, recipe)
        return [sharded.divided(found, spec, recipe) if recipe.parallel.data_ranks > 1 else found]
    if recipe.parallel.data_ranks == 1:
        return list(closed_form.moments(spec, recipe).values())
    if recipe.parallel.copies_weights:
        return [sharded.copied(spec, recipe)]
    return list(sharded.sharded_moments(spec, recipe).values())


def closed_form_band(spec: ModelSpec, recipe: Recipe) -> tuple[float, float]:
    """Relative error, low and high, of the closed form that knows this recipe best."""
    parallel = recipe.parallel
    if not rough.closed_form_knows(spec, recipe):
        return rough.ERROR_BAND
    return sharded.ERROR_BAND if parallel.data_ranks > 1 else closed_form.ERROR_BAND


def published_band(spec: ModelSpec, recipe: Recipe, device: Device, risk: float) -> tuple[float, float]:
    """How far peaks on a device may be from a rehearsal's, relative; nothing on a CPU."""
    return (0.0, 0.0) if device.kind == "cpu" else gpu_band(recipe, risk=risk)


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
