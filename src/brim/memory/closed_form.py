"""Peak bytes of a training step by owner, from a config alone, in microseconds and without torch.

A step has a few moments that can be its peak; each is a ledger, and the peak is the largest of them. This is an
estimate: what a library keeps is known here as rules (`kept`), not by running it. The rehearsal is exact.

Ignored: rotary tables, buffers, scalars, padding masks, and temporaries inside operators.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from brim.memory import kept
from brim.memory.anatomy import Block, Stack, anatomy
from brim.memory.kept import BF16, FP32, Terms
from brim.memory.packed import packed_bytes, packed_linears
from brim.memory.states import state_cost
from brim.models.spec import ModelSpec
from brim.numerics.granularity import parse_granularity
from brim.recipe import Recipe
from brim.report import Ledger

ERROR_BAND = (-0.10, 0.10)
"""Relative error (low, high) that the search allows for before a rehearsal: tests/cpu/test_closed_form_measured.py."""

_INDEX_BYTES = 8
_ROUNDING_BYTES = 17
"""Of an element of a rounded weight in backward: gradient, slope and their product in FP32, and where it is clipped."""


def closed_form(spec: ModelSpec, recipe: Recipe) -> Ledger:
    """The largest of the step's moments. Raises UsageError for a family without a row in `anatomy`."""
    return max(moments(spec, recipe).values(), key=lambda ledger: ledger.total)


def moments(spec: ModelSpec, recipe: Recipe) -> dict[str, Ledger]:
    """Name -> ledger of each moment that can be the peak."""
    step = step_of(spec, recipe)
    found = {name: step.ledger(moment) for name, moment in [*step.flowing().items(), ("step", step.at_optimizer())]}
    return found if step.terms.packed else {"building": step.at_building(), **found}


def tokens_of_chunk(vocab_size: int) -> int:
    """As layers.chunked_loss, which needs torch, cuts its chunks: FP32 logits of 32 MiB, at least 16 tokens."""
    return max(16, 32 * 2**20 // (FP32 * vocab_size))


class Moment(NamedTuple):
    """What exists at a moment of a step, beside what lives from step to step."""

    activations: int = 0
    loss: int = 0
    gradients: int = 0
    workspace: int = 0


def step_of(spec: ModelSpec, recipe: Recipe) -> "Step":
    return Step(spec=spec, recipe=recipe, terms=kept.terms(anatomy(spec), recipe))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One function for each moment, and for each line of what lives from step to step."""

    spec: ModelSpec
    recipe: Recipe
    terms: Terms

    def flowing(self) -> dict[str, Moment]:
        """Of forward and backward. The optimizer, its masters, offload and accumulation decide none of it."""
        named = {"loss": self.at_loss(), "head": self.at_head()}
        for stack in self.terms.parts.stacks:
            named[f"last block, {stack.row}"] = self.at_last_block(stack)
            named[f"first block, {stack.row}"] = self.at_first_block(stack)
        if self.terms.mixed:
            named["forward"] = self.at_end_of_forward()
        if self.terms.trains_base:
            named["embedding"] = self.at_embedding()
        return named

    def at_end_of_forward(self) -> Moment:
        """Autocast keeps its BF16 copy of every trained weight until forward ends, checkpointed or not."""
        t = self.terms
        cached = 0
        if self.checkpointed:
            cached = sum(stack.num_blocks * self._trained_casts(stack.block) for stack in t.parts.stacks)
        return Moment(
            activations=self.block_activations + self.outside_blocks + cached,
            loss=self.chunk_bytes if self.chunked else 2 * FP32 * self.logits + self.head_cast + self.capped_logits,
            gradients=self.gradient_beside_chunk,
        )

    def at_loss(self) -> Moment:
        """Everything kept, and the softmax's backward: log-probabilities and two gradients, all FP32.

        12 bytes a logit (memory of a fused loss: 4); chunked, of one chunk's logits.
        """
        loss = self.chunk_bytes if self.chunked else 3 * FP32 * self.logits + self.head_cast + self.capped_logits
        return Moment(
            activations=self.block_activations + self.outside_blocks, loss=loss, gradients=self.gradient_beside_chunk
        )

    def at_head(self) -> Moment:
        """The head's backward: its logits' gradient makes the gradients of its weight and of its input."""
        hidden = self.terms.compute_bytes * self.tokens * self.terms.parts.hidden_size
        logits = 0 if self.chunked else self.terms.compute_bytes * self.logits + self.head_cast
        return Moment(
            activations=self.block_activations + self.outside_blocks + hidden,
            loss=logits,
            gradients=self.head_gradient,
        )

    def at_last_block(self, stack: Stack) -> Moment:
        """Backward of the stack's last block begins; under checkpointing it has just been recomputed."""
        earlier = [other for other in self.terms.parts.stacks if other.row == "source" or other is stack]
        activations = sum(self.stack_activations(other) + self.biases(other) for other in earlier)
        gradients = self.head_gradient
        if stack.row == "source":
            gradients += sum(self.block_gradients(s) for s in self.terms.parts.stacks if s.row == "target")
        return Moment(activations=activations + self.recomputed(stack) + self.transient(stack), gradients=gradients)

    def at_first_block(self, stack: Stack) -> Moment:
        """Backward of the stack's first block: its activations, and the gradients of all blocks behind it."""
        first = self.recomputed(stack) or kept.block_bytes(stack.block, self.length(stack), self.terms)
        others = [s for s in self.terms.parts.stacks if s.row == "source" and s is not stack]
        behind = sum(self.stack_activations(other) + self.biases(other) for other in others)
        gradients = self.head_gradient + self.block_gradients(stack)
        if stack.row == "source":
            gradients += sum(self.block_gradients(s) for s in self.terms.parts.stacks if s.row == "target")
        return Moment(
            activations=first + self.transient(stack) + behind + self.biases(stack),
            gradients=gradients,
        )

    def at_embedding(self) -> Moment:
        """The last gradient. A tied head's was waiting for it: both, and their sum, exist at once.

        Under autocast the head's is not kept by anyone else and the embedding's is added to it in place; so it is
        under the chunked loss, which puts the head's where the optimizer reads it.
        """
        t = self.terms
        in_place = t.mixed or self.chunked
        gradients = t.weight_bytes * (self.spec.num_parameters + self.undivided) + self.scale_bytes
        flowing = FP32 * self.tokens * t.parts.hidden_size if in_place else 0
        if t.parts.tied_head:
            gradients += (1 if in_place else 2) * t.weight_bytes * t.parts.embedding_parameters
        return Moment(activations=flowing, gradients=gradients)

    def at_optimizer(self) -> Moment:
        """All gradients, and the optimizer's temporaries for one parameter (the largest comes first).

        Over FP32 masters, also that parameter's FP32 gradient.
        """
        stepped_bytes = FP32 if self.has_master else self.terms.weight_bytes
        workspace = state_cost(self.recipe.optimizer).temporary_bytes(self.largest_trained, stepped_bytes)
        if self.has_master:
            workspace += FP32 * self.largest_trained
        gradients = (self.trainable + self.undivided) * self.terms.weight_bytes + self.scale_bytes
        return Moment(gradients=gradients, workspace=workspace)

    def at_building(self) -> Ledger:
        """The model alone, as transformers makes it: each stack and the head with a table of their own, of which those
        that are tied go afterwards. (A packed base is made without data.)"""
        parts = self.terms.parts
        made = 2 if len(parts.stacks) == 1 else 2 + len(parts.stacks)  # one that both stacks share comes first
        more = made - (1 if parts.tied_head else 2)
        tables = more * parts.embedding_parameters
        return Ledger(weights=self.terms.weight_bytes * (self.spec.num_parameters + tables))

    def ledger(self, moment: Moment) -> Ledger:
        """A moment, and what lives from step to step."""
        least, most = self.gradient_range
        return Ledger(
            weights=self.weights,
            optimizer=self.optimizer_states,
            activations=moment.activations,
            loss=moment.loss,
            gradients=min(max(moment.gradients, least), most),
            workspace=moment.workspace + self.batch_bytes,
        )

    @property
    def gradient_range(self) -> tuple[int, int]:
        """Bytes of gradients, at least and at most, that are alive at every moment.

        While micro-batches accumulate, all of the earlier ones, beside those that the present one has just made for
        the tensors it is at (at most a table: taken as none). Stepped in backward: the largest that wait.
        """
        most = self.largest_gradients if self.recipe.optimizer.in_backward else 2**62
        return (self.trainable * self.terms.weight_bytes if self.recipe.grad_accumulation > 1 else 0), most

    @property
    def largest_gradients(self) -> int:
        """Of those that wait for each other when each is stepped in backward: a tied head's and embedding's."""
        waiting = 2 if self.terms.trains_base and self.terms.parts.tied_head and not self.terms.mixed else 1
        return waiting * self.largest_trained * self.terms.weight_bytes

    @property
    def adapters(self) -> int:
        t = self.terms
        return sum(stack.num_blocks * t.added_parameters(stack.block) for stack in t.parts.stacks)

    @property
    def trainable(self) -> int:
        """Parameters, learned scales not counted."""
        return self.spec.num_parameters if self.terms.trains_base else self.adapters

    @property
    def undivided(self) -> int:
        """Elements of gradients of what other devices have of a shared embedding."""
        return (
            self.terms.parts.embedding_gradients - self.terms.parts.embedding_parameters
            if self.terms.trains_base
            else 0
        )

    @property
    def largest_trained(self) -> int:
        """Elements of the largest trained tensor: the embedding or all experts', or an adapter's longer matrix."""
        t = self.terms
        linears = [line for stack in t.parts.stacks for line in stack.block.linears]
        if t.trains_base:
            return max(t.parts.embedding_gradients, *(line.num_weights for line in linears))
        adapted = (line for line in linears if t.adapts(line))
        return max((t.rank * line.fused * line.experts * max(line.inputs, line.outputs) for line in adapted), default=0)

    @property
    def weights(self) -> int:
        """Parameters and adapters, in the stored format."""
        plain, packed = self.spec.num_parameters + self.adapters, 0
        if self.terms.packed:
            for count, linear in packed_linears(self.terms.parts):
                plain -= count * linear.num_weights
                packed += count * packed_bytes(linear, self.recipe.precision)
        return self.terms.weight_bytes * plain + packed + self.scale_bytes

    @property
    def scale_bytes(self) -> int:
        """Learned scales, FP32."""
        if not self.terms.rounds:
            return 0
        return sum(stack.num_blocks * self._block_scales(stack.block) for stack in self.terms.parts.stacks)

    def _block_scales(self, block: Block) -> int:
        granularity = parse_granularity(self.recipe.qat.granularity)
        shapes = (granularity.scale_shape((linear.outputs, linear.inputs)) for linear in block.linears)
        return sum(FP32 * prod(shape) for shape in shapes) if self.terms.rounds else 0

    @property
    def has_master(self) -> bool:
        return self.recipe.precision.master == "fp32" and self.terms.weight_bytes < FP32

    @property
    def optimizer_states(self) -> int:
        """In the format of what is updated (AdamW: two moments); and the FP32 master copy, if it is that."""
        cost = state_cost(self.recipe.optimizer)
        scales = cost.state_bytes(self.scale_bytes // FP32, FP32)
        if self.has_master:
            return self.trainable * FP32 + cost.state_bytes(self.trainable, FP32) + scales
        copied = {"optimizer": self.trainable}  # of the weights, stepped on the host (on a CPU the same memory)
        if self.terms.trains_base and self.recipe.memory.offloads_weights:
            copied[self.recipe.memory.offload] = self.terms.parts.embedding_parameters
        copies = self.terms.weight_bytes * copied.get(self.recipe.memory.offload, 0)
        return copies + cost.state_bytes(self.trainable, self.terms.weight_bytes) + scales

    @property
    def batch_bytes(self) -> int:
        """Token and label indices."""
        t = self.terms
        inputs = 2 * t.source_len or t.target_len  # an encoder reads a padding mask as well
        return _INDEX_BYTES * t.rows * (inputs + t.target_len)

    @property
    def checkpointed(self) -> bool:
        return self.recipe.memory.activation_checkpointing != "none"

    @property
    def chunked(self) -> bool:
        return self.recipe.memory.loss == "chunked"

    @property
    def tokens(self) -> int:
        """Target tokens of a micro-batch: each has its logits."""
        return self.terms.rows * self.terms.target_len

    @property
    def logits(self) -> int:
        return self.tokens * self.terms.parts.vocab_size

    @property
    def capped_logits(self) -> int:
        """The result of a softcap's tanh, which its backward reads."""
        return self.terms.compute_bytes * self.logits if self.terms.parts.caps_logits else 0

    @property
    def outside_blocks(self) -> int:
        """Final norms, dropouts around the stacks, position biases."""
        return sum(kept.stack_bytes(stack, self.length(stack), self.terms) for stack in self.terms.parts.stacks)

    @property
    def head_gradient(self) -> int:
        """Of the output head's weight, until the optimizer or a tied embedding takes it."""
        return self.terms.weight_bytes * self.terms.parts.embedding_parameters if self.terms.trains_base else 0

    @property
    def head_cast(self) -> int:
        """Autocast's BF16 copy of the head's weight."""
        return BF16 * self.terms.parts.embedding_parameters if self.terms.mixed else 0

    @property
    def chunk_bytes(self) -> int:
        """Chunked loss in forward: one chunk's logits, their gradient by way of FP32, and their input's gradient.

        FP32 logits turn into their gradient where they are, unless others are made of them before (by a cap two, by a
        factor or a bias one), which stay beside.
        """
        t = self.terms
        others = t.compute_bytes * (2 if t.parts.caps_logits else t.parts.turns_logits)
        in_fp32 = (FP32 if others else 0) if t.compute_bytes == FP32 else FP32 + t.compute_bytes
        one = self.chunk_tokens * t.parts.vocab_size * (t.compute_bytes + others + in_fp32)
        return one + self.head_cast + t.weight_bytes * self.tokens * t.parts.hidden_size

    @property
    def chunk_tokens(self) -> int:
        return min(tokens_of_chunk(self.terms.parts.vocab_size), self.tokens)

    @property
    def gradient_beside_chunk(self) -> int:
        """The head's gradient, which the first chunk makes and the next ones find."""
        return self.head_gradient if self.chunked and self.chunk_tokens < self.tokens else 0

    @property
    def block_activations(self) -> int:
        return sum(self.stack_activations(stack) for stack in self.terms.parts.stacks)

    def stack_activations(self, stack: Stack) -> int:
        """What all blocks of a stack keep; under checkpointing, only each one's input, or its linears' results too."""
        length = self.length(stack)
        if self.checkpointed:
            inputs = self.terms.weight_bytes * self.terms.rows * length * self.terms.parts.hidden_size
            if self.recipe.memory.activation_checkpointing == "selective":
                inputs += kept.linear_result_bytes(stack.block, length, self.terms)
            return stack.num_blocks * inputs
        return stack.num_blocks * kept.block_bytes(stack.block, length, self.terms)

    def biases(self, stack: Stack) -> int:
        return kept.bias_bytes(stack, self.length(stack), self.terms)

    def recomputed(self, stack: Stack) -> int:
        return kept.block_bytes(stack.block, self.length(stack), self.terms) if self.checkpointed else 0

    def transient(self, stack: Stack) -> int:
        """Beside a block's activations, the gradients that flow through its feed-forward or, later, its scores."""
        t, length = self.terms, self.length(stack)
        feed = stack.block.feed_forward
        places = t.rows * length * feed.out.visited
        through = places * (2 * t.compute_bytes * feed.width + t.weight_bytes * t.parts.hidden_size)
        # beside the sums of experts and adapters, the gradient of the first that is done with
        through += t.weight_bytes * feed.out.num_weights if t.adapts(feed.out) and feed.num_experts > 1 else 0
        freed = kept.feed_forward_bytes(feed, length, t)
        scores = (kept.score_gradient_bytes(attention, length, t) for attention in stack.block.attentions)
        masks = kept.mask_bytes(stack.block, length, t)
        largest = max(linear.inputs * linear.outputs // linear.fused for linear in stack.block.linears)
        unpacked = t.compute_bytes * largest if t.packed else 0
        rounded = _ROUNDING_BYTES * largest if t.rounds else 0
        return max(rounded, unpacked + through + masks, *(nbytes - freed for nbytes in scores))

    def block_gradients(self, stack: Stack) -> int:
        linears = sum(line.num_parameters for line in stack.block.linears)
        trained = linears if self.terms.trains_base else self.terms.added_parameters(stack.block)
        return stack.num_blocks * (trained * self.terms.weight_bytes + self._block_scales(stack.block))

    def length(self, stack: Stack) -> int:
        return self.terms.source_len if stack.row == "source" else self.terms.target_len

    def _trained_casts(self, block: Block) -> int:
        trained = sum(line.num_parameters for line in block.linears) if self.terms.trains_base else 0
        return BF16 * (trained + self.terms.adapter_parameters(block))
