"""Time of an optimizer step: its matrix products at the device's achieved rate, the rest at its bandwidth. No torch.

Counted by tensor shapes, so encoder-decoder models come out right: each row's tokens meet only their own stack's
weights (3 N D with source and target counted together, not 6 N D). Products and elementwise work alternate and do
not overlap on one stream, so their times are added.

Ignored: launching operators (which rules models under about 50M parameters), loading data, and that rates differ by
shape. What devices of a sharded step tell each other is `communication`. Ranks recipes well; as a forecast in seconds
take it for a lower bound.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from brim.hardware.device import Device, MatmulFormat
from brim.memory import kept
from brim.memory.anatomy import Block, Linear, Stack, anatomy
from brim.memory.kept import BF16, FP32, Terms
from brim.memory.rough import closed_form_knows, kept_bytes, trained_parameters, weights_of_blocks
from brim.memory.states import state_cost
from brim.memory.tensor import whole_of
from brim.models.spec import ModelSpec
from brim.recipe import Recipe
from brim.speed.communication import talking

_LINK_BYTES_PER_S = 25e9
"""PCIe 4.0 x16: 31.5 GB/s by its lanes (16 GT/s, 128b/130b), about four fifths of it for data."""
_HOST_BYTES_PER_S = 50e9
"""Two channels of DDR4-3200 (JESD79-4): the least that a machine with such a link has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One optimizer step, all its micro-batches."""

    flops: float
    """Of matrix products, in the recipe's compute format."""
    traffic_bytes: float
    """Read and written by everything else."""
    compute: MatmulFormat


def step_time(spec: ModelSpec, recipe: Recipe, device: Device) -> float:
    """Seconds of one optimizer step."""
    work = step_work(spec, recipe)
    seconds = work.flops / device.flops[work.compute] + work.traffic_bytes / device.bandwidth_bytes_per_s
    seconds += offloaded_s(spec, recipe) if device.kind == "cuda" else 0.0
    return talking(spec, recipe, device, seconds)


class Crossing(NamedTuple):
    """Seconds of an optimizer step's offloading, nothing overlapped."""

    step_s: float
    turn_s: float
    """For each micro-batch."""
    row_s: float
    """For each row of each micro-batch."""

    def seconds(self, *, rows: int, turns: int) -> float:
        return self.step_s + turns * (self.turn_s + rows * self.row_s)


def crossing(spec: ModelSpec, recipe: Recipe) -> Crossing:
    """What crosses the link, and the step at the host's bandwidth; rows and accumulation decide none of it.

    optimizer: gradients to the host and weights back, once a step. Of each micro-batch, weights: those of blocks twice
    to the device (forward, and backward or what it runs again), gradients to the host; activations: there and back.
    A rank has its part of weights and gradients.
    """
    memory, ranks = recipe.memory, recipe.parallel.state_shards
    trained = trained_parameters(spec, recipe) // ranks
    element_bytes = FP32 if recipe.plain_format == "fp32" else BF16
    step_bytes, turn_bytes, row_bytes, seconds = 0, 0, 0, 0.0
    if memory.offloads_optimizer:
        stepped_bytes = FP32 if recipe.precision.master == "fp32" else element_bytes
        seconds = trained * stepped_bytes * state_cost(recipe.optimizer).step_passes / _HOST_BYTES_PER_S
        step_bytes = 2 * trained * element_bytes
    if memory.offloads_weights:
        turn_bytes = 2 * weights_of_blocks(spec, recipe) // ranks + trained * element_bytes
        step_bytes -= trained * element_bytes
    if memory.offloads_activations:
        row_bytes = 2 * kept_bytes(spec, replace(recipe, micro_batch_size=1))
    return Crossing(
        seconds + step_bytes / _LINK_BYTES_PER_S, turn_bytes / _LINK_BYTES_PER_S, row_bytes / _LINK_BYTES_PER_S
    )


def offloaded_s(spec: ModelSpec, recipe: Recipe) -> float:
    """Seconds of an optimizer step's offloading; 0 without."""
    if recipe.memory.offload == "none":
        return 0.0
    return crossing(spec, recipe).seconds(rows=recipe.micro_batch_size, turns=recipe.grad_accumulation)


def tokens_per_s(recipe: Recipe, seconds: float) -> float:
    """Tokens of an optimizer step over its time; source and target counted together."""
    return recipe.tokens_per_step / seconds


def step_work(spec: ModelSpec, recipe: Recipe) -> Work:
    """FLOPs and traffic of one optimizer step, on each device."""
    spec, recipe = whole_of(spec, recipe)
    if not closed_form_knows(spec, recipe):
        return _rough_work(spec, recipe)
    t = kept.terms(anatomy(spec), recipe)
    flops, traffic = micro_batch_work(recipe, t)
    return Work(
        flops=float(recipe.grad_accumulation * flops),
        traffic_bytes=float(
            recipe.grad_accumulation * traffic + optimizer_traffic(spec, recipe, t) // recipe.parallel.state_shards
        ),
        compute=recipe.precision.compute,
    )


def micro_batch_work(recipe: Recipe, t: Terms) -> tuple[int, int]:
    """FLOPs and traffic of one micro-batch's forward and backward. The optimizer decides none of it."""
    checkpointed = recipe.memory.activation_checkpointing == "full"
    recomputed = recipe.memory.activation_checkpointing != "none"
    flops = _head_flops(t) + sum(
        _stack_flops(stack, t, linears_again=checkpointed, attention_again=recomputed) for stack in t.parts.stacks
    )
    return flops, _forward_backward_traffic(t, checkpointed=recomputed)


def attention_flops(spec: ModelSpec, recipe: Recipe) -> float:
    """Of an optimizer step's attention, all scores, where a fused kernel hides its products; 0 where none does.

    By the config alone for a family without a row: every block attends over its row.
    """
    if recipe.memory.attention == "eager":
        return 0.0
    passes = 3 + (recipe.memory.activation_checkpointing != "none")
    if closed_form_knows(spec, recipe):
        t = kept.terms(anatomy(spec), recipe)
        once = sum(stack.num_blocks * _attention_flops(stack.block, stack.row, t) for stack in t.parts.stacks)
    else:
        scores = recipe.micro_batch_size * recipe.seq_len**2
        once = spec.num_layers * 4 * scores * spec.num_heads * spec.head_dim
    return float(recipe.grad_accumulation * passes * once)


def _rough_work(spec: ModelSpec, recipe: Recipe) -> Work:
    """By the number of parameters alone (6 N D, experts not spared), for a family without a row in `memory.anatomy`."""
    trained = trained_parameters(spec, recipe)
    forwards = 2 + (recipe.memory.activation_checkpointing == "full")
    passes = state_cost(recipe.optimizer).step_passes
    weight_bytes = FP32 if recipe.plain_format == "fp32" else BF16
    products, shards = spec.num_parameters * forwards + trained, recipe.parallel.state_shards
    return Work(
        flops=float(2 * recipe.tokens_per_step // recipe.parallel.data_ranks * products),
        traffic_bytes=float(weight_bytes * (recipe.grad_accumulation * products + (3 + passes) * trained / shards)),
        compute=recipe.precision.compute,
    )


def _stack_flops(stack: Stack, t: Terms, *, linears_again: bool, attention_again: bool) -> int:
    """Forward 1, gradient of inputs 1, gradient of trained weights 1, recomputed forward 1."""
    passes = 2 + linears_again
    linears = 2 * _multiplications(stack.block, stack.row, t) * (passes + t.trains_base)
    adapters = 2 * _adapter_multiplications(stack.block, t.rows * _length(stack.row, t), t) * (passes + 1)
    # attention's backward has two products for each of forward's two
    attention = _attention_flops(stack.block, stack.row, t) * (3 + attention_again)
    return stack.num_blocks * (linears + adapters + attention)


def _multiplications(block: Block, row: str, t: Terms) -> int:
    """Of all linears of a block, once forward: tokens x inputs x outputs; cross-attention's k and v see the source."""
    tokens, products = _length(row, t), 0
    for attention in block.attentions:
        queries, *keys_and_values = attention.into
        others = t.source_len if attention.cross else tokens
        products += tokens * (_size(queries) + _size(attention.out)) + others * sum(map(_size, keys_and_values))
    feed = block.feed_forward
    return t.rows * (products + tokens * sum(map(_size, (*feed.into, feed.out))))


def _adapter_multiplications(block: Block, tokens: int, t: Terms) -> int:
    """Narrow products of each token; experts' adapters are multiplied out, whatever the tokens."""
    return sum(
        t.rank * (tokens * (line.inputs + line.outputs) if line.experts == 1 else line.fused * line.num_weights)
        for line in block.linears
        if t.adapts(line)
    )


def _size(linear: Linear) -> int:
    """Multiplications of a token, at each expert that it visits."""
    return linear.visited * linear.inputs * linear.outputs


def _attention_flops(block: Block, row: str, t: Terms) -> int:
    """Scores and their product with v, forward: 4 x rows x tokens x keys x width; no saving for a causal mask."""
    tokens = _length(row, t)
    return sum(
        4 * t.rows * tokens * (t.source_len if attention.cross else tokens) * attention.query_width
        for attention in block.attentions
    )


def _head_flops(t: Terms) -> int:
    """Logits, their gradient to the hidden states, and (if trained) to the head's weight; never recomputed."""
    return 2 * t.rows * t.target_len * t.parts.embedding_parameters * (2 + t.trains_base)


def _forward_backward_traffic(t: Terms, *, checkpointed: bool) -> int:
    """What is kept is written and read once, and so is its gradient; recomputation writes it once more.

    Logits in FP32: eight passes of upcast, log-softmax and their backward. Weights are read by each of their
    products; a trained weight's gradient is written.
    """
    activations = sum(
        stack.num_blocks * kept.block_bytes(stack.block, _length(stack.row, t), t) for stack in t.parts.stacks
    )
    logits = 8 * FP32 * t.rows * t.target_len * t.parts.vocab_size
    weights = t.weight_bytes * (t.parts.block_linear_parameters + t.parts.embedding_parameters)
    # made anew for each product: a packed weight is read, written and read; a rounded one in five operators
    passes = 2.5 if t.packed else 10 if t.rounds else 1
    return (4 + checkpointed) * activations + logits + int(passes * (2 + checkpointed + t.trains_base) * weights)


def optimizer_traffic(spec: ModelSpec, recipe: Recipe, t: Terms) -> int:
    """Reads the gradient, passes over weight and states (fused AdamW reads and writes each once); clipping reads and
    writes gradients once more. Over FP32 masters all but weight and gradient are FP32."""
    adapters = sum(stack.num_blocks * t.added_parameters(stack.block) for stack in t.parts.stacks)
    trained = spec.num_parameters if t.trains_base else adapters
    gradient, passes = 3 * t.weight_bytes, state_cost(recipe.optimizer).step_passes
    if recipe.precision.master == "fp32" and t.weight_bytes < FP32:
        # the gradient's FP32 copy is written and read
        return trained * (gradient + (2 + passes) * FP32 + t.weight_bytes)
    return trained * (gradient + passes * t.weight_bytes)


def _length(row: str, t: Terms) -> int:
    return t.source_len if row == "source" else t.target_len
