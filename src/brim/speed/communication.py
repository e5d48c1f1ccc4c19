"""How long the devices of a step talk, and how much of that hides behind their work.

Each collective is a ring: of S bytes among n devices, a gather or a reduction moves (n - 1) / n S over each link, a sum
that all receive twice that. Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009; NCCL's rings.
A ring over several machines goes as fast as the link between them.

Ignored: what starting a collective takes, which rules where models are small and devices many.
"""

from dataclasses import dataclass

from brim.hardware.device import Device
from brim.memory.anatomy import Block, anatomy
from brim.memory.kept import ELEMENT_BYTES
from brim.memory.rough import closed_form_knows, trained_parameters
from brim.models.spec import ModelSpec
from brim.recipe import Recipe

_REACHED = 0.8
"""Of a link's advertised bytes/s: Stas Bekman, Machine Learning Engineering, "Network"."""
_UNKNOWN_LINK = 16e9
"""Bytes/s in one direction where the catalogue names no link: PCIe 3.0 x16."""
BETWEEN_NODES = 25e9
"""Bytes/s and device between machines: 200 Gb/s InfiniBand for each, as in a DGX A100 (NVIDIA's system guide)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """Seconds of an optimizer step's collectives, one after another."""

    row_s: float = 0.0
    """For each row of each micro-batch: sums within a block, which the next operator waits for."""
    turn_s: float = 0.0
    """For each micro-batch."""
    step_s: float = 0.0
    num_blocks: int = 1

    def seconds(self, *, rows: int, turns: int) -> float:
        """Of all collectives; `rows` of a micro-batch, `turns` micro-batches."""
        return turns * rows * self.row_s + turns * self.turn_s + self.step_s

    def around(self, working_s: float, *, rows: int, turns: int) -> float:
        """Seconds of a step of `working_s` on each device, its communication added where nothing hides it.

        A block is gathered or reduced while another is worked on, so the longer of the two rules; the first block's
        gather and the last one's reduction have nothing beside them.
        """
        shared = turns * self.turn_s + self.step_s
        exposed = shared / max(1, self.num_blocks)
        return max(working_s + turns * rows * self.row_s, shared - exposed) + exposed


def talking(spec: ModelSpec, recipe: Recipe, device: Device, working_s: float) -> float:
    """Seconds of an optimizer step of `working_s` on each device, communication and all."""
    talk = talk_of(spec, recipe, device)
    return talk.around(working_s, rows=recipe.micro_batch_size, turns=recipe.grad_accumulation)


def communication_s(spec: ModelSpec, recipe: Recipe, device: Device) -> float:
    """Seconds of all collectives of an optimizer step, one after another; 0 for one device."""
    return talk_of(spec, recipe, device).seconds(rows=recipe.micro_batch_size, turns=recipe.grad_accumulation)


def talk_of(spec: ModelSpec, recipe: Recipe, device: Device) -> Talk:
    """What a recipe's devices tell each other; its micro-batch and accumulation decide none of it."""
    parallel = recipe.parallel
    within = _REACHED * (device.link_bytes_per_s or _UNKNOWN_LINK)
    row_s = _tensor_bytes(spec, recipe) / within if parallel.tensor > 1 else 0.0
    if parallel.data_ranks == 1:
        return Talk(row_s=row_s)
    turn_s, step_s = _data_s(spec, recipe, within)
    return Talk(row_s=row_s, turn_s=turn_s, step_s=step_s, num_blocks=spec.num_layers)


def _data_s(spec: ModelSpec, recipe: Recipe, within: float) -> tuple[float, float]:
    """Seconds of each micro-batch and of each step, among devices that see different rows."""
    parallel = recipe.parallel
    ranks, nodes, tensor = parallel.data_ranks, parallel.nodes, parallel.tensor
    # devices that share matrices each meet their own part of the other rows' devices
    gathered = ELEMENT_BYTES[recipe.precision.compute] * spec.num_parameters / tensor
    reduced = ELEMENT_BYTES[recipe.plain_format] * trained_parameters(spec, recipe) / tensor
    across = min(within, _REACHED * BETWEEN_NODES) if nodes > 1 else within
    match parallel.sharding:
        case "ddp":  # once, as the last micro-batch's gradients come
            return 0.0, 2 * _ring(ranks) * reduced / across
        case "zero1":  # and stepped weights go to all
            return 0.0, 3 * _ring(ranks) * reduced / across
        case "zero2":
            return _ring(ranks) * (gathered + reduced) / across, 0.0
        case "hsdp":  # shards meet within a node, their sums across nodes
            shards = max(1, ranks // nodes)
            inside = _ring(shards) * (2 * gathered + reduced) / within
            return inside + 2 * _ring(nodes) * reduced / shards / across, 0.0
        case _:
            return _ring(ranks) * (2 * gathered + reduced) / across, 0.0


def _tensor_bytes(spec: ModelSpec, recipe: Recipe) -> float:
    """Bytes over each link for a row, where devices share each matrix and so sum what they made of it.

    Forward sums the results of a block's two divided inputs, attention's and the feed-forward's (Shoeybi et al.,
    "Megatron-LM", 2019, section 3); recomputation once more. Backward sums the gradient of each divided output's
    input, apart for q, k, v, gate and up: each is a module of its own in transformers.
    """
    forwards = 1 + (recipe.memory.activation_checkpointing == "full")
    if closed_form_knows(spec, recipe):
        sums = sum(stack.num_blocks * _sums(stack.block, forwards) for stack in anatomy(spec).stacks)
    else:
        sums = spec.num_layers * (2 * forwards + 5)
    nbytes = ELEMENT_BYTES[recipe.precision.compute] * recipe.seq_len * spec.hidden_size
    return 2 * _ring(recipe.parallel.tensor) * sums * nbytes


def _sums(block: Block, forwards: int) -> int:
    backward = sum(len(attention.into) for attention in block.attentions) + len(block.feed_forward.into)
    return forwards * (len(block.attentions) + 1) + backward


def _ring(devices: int) -> float:
    """Share of the bytes that passes each link in one way round."""
    return (devices - 1) / devices
