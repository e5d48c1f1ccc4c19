"""How far hardware reaches and how little a job takes, under a plan: asked of the planner, and printed."""

from brim.cli import console
from brim.hardware import Device, find
from brim.hardware.catalogue import MODELLED_VENDORS, accelerators
from brim.models import ModelSpec, catalogue, describe
from brim.planning import Constraints, Offer
from brim.planning.limits import Limits, limits
from brim.planning.ways_out import summary
from brim.report import Prediction
from brim.units import format_bytes, format_count


def of(spec: ModelSpec, offer: Offer, constraints: Constraints) -> Limits:
    """Of all devices that the catalogue knows and that compute in BF16, and of all its models with the same task."""
    rows = (row for row in accelerators().values() if row.vendor in MODELLED_VENDORS and "bf16" in row.peak_flops)
    devices = [find(row.name) for row in rows]
    asked = constraints.on(offer.device, devices_per_node=offer.devices_per_node, nodes=offer.nodes)
    released = (describe(entry.alias) for entry in catalogue.entries().values() if entry.hub_id)
    return limits(
        spec,
        offer.device,
        asked,
        budget_bytes=offer.budget_bytes,
        devices=devices,
        models=(model for model in released if model.task == spec.task),
    )


def show(found: Limits, device: Device) -> None:
    """A line each; all by closed form."""
    rows = {"longest row": found.longest_row, "largest batch": found.largest_batch}
    for what, prediction in rows.items():
        _say(f"{what} on {device.name}: {_what(prediction)}")
    _say(f"largest model on {device.name}: {_model(found.largest_model)}")
    for count, prediction in found.smallest.items():
        _say(f"smallest {count} x: {prediction.device_name}, {_what(prediction)}")
    if not found.smallest:
        _say("no machine of up to 8 devices that the catalogue knows holds this job")


def _model(prediction: Prediction | None) -> str:
    if prediction is None:
        return "none of the catalogue's fits"
    return f"{prediction.model} of {format_count(describe(prediction.model).num_parameters)}, {_what(prediction)}"


def _what(prediction: Prediction | None) -> str:
    if prediction is None:
        return "nothing fits, or it is decided by --set"
    sharding = prediction.recipe["parallel"]["sharding"]
    divided = "" if sharding == "none" else f", {sharding}"
    return f"~{format_bytes(prediction.peak.highest_bytes)} ({summary(prediction)}{divided})"


def _say(line: str) -> None:
    console.out.print(line, markup=False, soft_wrap=True)
