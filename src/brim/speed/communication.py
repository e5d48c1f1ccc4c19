"""How long the devices of a sharded step talk, and how much of that hides behind their work.

Each collective is a ring: of S bytes among n devices, a gather or a reduction moves (n - 1) / n S over each link, a sum
that all receive twice that. Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009; NCCL's rings.
A ring over several machines goes as fast as the link between them.

Ignored: what starting a collective takes, which rules where models are small and devices many.
"""

from brim.hardware.device import Device
from brim.memory.kept import ELEMENT_BYTES
from brim.memory.rough import trained_parameters
from brim.models.spec import ModelSpec
from brim.recipe import Recipe

_REACHED = 0.8
"""Of a link's advertised bytes/s: Stas Bekman, Machine Learning Engineering, "Network"."""
_UNKNOWN_LINK = 16e9
"""Bytes/s in one direction where the catalogue names no link: PCIe 3.0 x16."""
BETWEEN_NODES = 25e9
"""Bytes/s and device between machines: 200 Gb/s InfiniBand for each, as in a DGX A100 (NVIDIA's system guide)."""


def talking(spec: ModelSpec, recipe: Recipe, device: Device, working_s: float) -> float:
    """Seconds of an optimizer step of `working_s` on each device, their communication added where nothing hides it.

    A block is gathered or reduced while another is worked on, so the longer of the two rules; the first block's gather
    and the last one's reduction have nothing beside them.
    """
    seconds = communication_s(spec, recipe, device)
    exposed = seconds / max(1, spec.num_layers)
    return max(working_s, seconds - exposed) + exposed


def communication_s(spec: ModelSpec, recipe: Recipe, device: Device) -> float:
    """Seconds of all collectives of an optimizer step, one after another; 0 for one device."""
    parallel, turns = recipe.parallel, recipe.grad_accumulation
    ranks, nodes = parallel.data_ranks, parallel.nodes
    if ranks == 1:
        return 0.0
    gathered = ELEMENT_BYTES[recipe.precision.compute] * spec.num_parameters
    reduced = ELEMENT_BYTES[recipe.plain_format] * trained_parameters(spec, recipe)
    within = _REACHED * (device.link_bytes_per_s or _UNKNOWN_LINK)
    across = min(within, _REACHED * BETWEEN_NODES) if nodes > 1 else within
    match parallel.sharding:
        case "ddp":  # once, as the last micro-batch's gradients come
            return 2 * _ring(ranks) * reduced / across
        case "zero1":  # and stepped weights go to all
            return 3 * _ring(ranks) * reduced / across
        case "zero2":
            return turns * _ring(ranks) * (gathered + reduced) / across
        case "hsdp":  # shards meet within a node, their sums across nodes
            shards = max(1, ranks // nodes)
            inside = _ring(shards) * (2 * gathered + reduced) / within
            return turns * (inside + 2 * _ring(nodes) * reduced / shards / across)
        case _:
            return turns * _ring(ranks) * (2 * gathered + reduced) / across


def _ring(devices: int) -> float:
    """Share of the bytes that passes each link in one way round."""
    return (devices - 1) / devices
