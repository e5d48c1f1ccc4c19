"""Peak bytes of one rank of a sharded training step, by closed form: what is divided, what is gathered, and when.

ZeRO-2, ZeRO-3 and HSDP as PyTorch's `fully_shard` does them, with a group for each block and one for the rest (the
embedding, the head, the last norm), which stays gathered through the step. Of P parameters on N ranks that share them,
each rank holds weights, gradients and optimizer states of P / N. Beside them it holds for a while (source: torch 2.13,
distributed/fsdp/_fully_shard/_fsdp_param_group.py):

- the gathered rest, and of the blocks: all until their backward (ZeRO-2), or the present one and the one that is
  gathered ahead (ZeRO-3);
- the rest's gradients until backward ends; a block's, and the copy of them that is sent, until they are reduced.

Activations and logits are those of one device. Weights in FP32 under BF16 compute are gathered in BF16, and their
gradients reduced in FP32.
"""

from dataclasses import dataclass, replace

from brim.memory import kept
from brim.memory.anatomy import Linear, Stack, anatomy
from brim.memory.closed_form import closed_form, moments
from brim.memory.kept import ELEMENT_BYTES, FP32, Terms
from brim.memory.packed import code_bytes, packed_bytes, packed_linears
from brim.memory.states import state_cost
from brim.models.spec import ModelSpec
from brim.recipe import Parallel, Recipe
from brim.report import Ledger

ERROR_BAND = (-0.10, 0.10)
"""Relative error (low, high) that the search allows for before a rehearsal: tests/cpu/test_sharded_closed_form.py."""


def sharded(spec: ModelSpec, recipe: Recipe) -> Ledger:
    """The largest of the step's moments, on the busiest rank. Raises UsageError for a family without a row."""
    return max(sharded_moments(spec, recipe).values(), key=lambda ledger: ledger.total)


def copied(spec: ModelSpec, recipe: Recipe) -> Ledger:
    """DDP and ZeRO-1: one device's step whose gradients all live from the first step on, in DDP's buckets; of the
    optimizer's states each rank has its share under ZeRO-1."""
    alone = replace(recipe, parallel=Parallel(), grad_accumulation=max(2, recipe.grad_accumulation))
    whole = closed_form(spec, alone)
    return replace(whole, optimizer=whole.optimizer // recipe.parallel.state_shards)


def divided(alone: Ledger, spec: ModelSpec, recipe: Recipe) -> Ledger:
    """A device's rough ledger, spread over the ranks: three blocks and the tables of tokens are gathered."""
    parallel = recipe.parallel
    optimizer = alone.optimizer // parallel.state_shards
    if parallel.copies_weights:
        return replace(alone, optimizer=optimizer)
    table = ELEMENT_BYTES[recipe.precision.compute] * spec.hidden_size * spec.vocab_size
    whole = alone.weights if recipe.precision.packed else ELEMENT_BYTES[recipe.precision.compute] * spec.num_parameters
    blocks = max(0, whole - 2 * table)
    held = 1.0 if parallel.sharding == "zero2" else min(1.0, 3 / spec.num_layers)
    return replace(
        alone,
        weights=alone.weights // parallel.state_shards,
        gradients=alone.gradients // parallel.state_shards,
        optimizer=optimizer,
        gathered=2 * table + int(held * blocks),
    )


def sharded_moments(spec: ModelSpec, recipe: Recipe) -> dict[str, Ledger]:
    """Name -> ledger of each moment of one rank that can be the peak."""
    alone = alone_of(recipe)
    terms = kept.terms(anatomy(spec), alone)
    step = Sharded(spec=spec, recipe=recipe, terms=terms)
    named = {name: step.at(name, ledger) for name, ledger in moments(spec, alone).items()}
    return {"start": step.at_start(), **named}


def alone_of(recipe: Recipe) -> Recipe:
    """One device's recipe of the same activations: gathered weights are in the format that matmuls run in."""
    precision = recipe.precision
    if precision.weights == "fp32" and precision.compute == "bf16":
        precision = replace(precision, weights="bf16", master="none")
    return replace(recipe, precision=precision, parallel=Parallel())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    spec: ModelSpec
    recipe: Recipe
    terms: Terms
    """Of one device, with weights as they are gathered."""

    def at_start(self) -> Ledger:
        """The rest, as it was received and as it is laid out, and the first blocks on their way."""
        gathered = 2 * self.terms.weight_bytes * self.rest + min(2, self.num_blocks) * self.block_bytes
        waiting = self.divided(self.trained) if self.recipe.grad_accumulation > 1 else 0
        return self.ledger(gathered=gathered, gradients=waiting)

    def at(self, name: str, alone: Ledger) -> Ledger:
        """A moment of one device's step, on a rank of many."""
        if name == "step":
            return self.ledger(gradients=self.divided(self.trained), workspace=alone.workspace // self.ranks)
        gradients, gathered = self.beside(name)
        return self.ledger(
            activations=alone.activations,
            loss=alone.loss,
            gradients=gradients,
            gathered=gathered,
            workspace=alone.workspace,
        )

    def beside(self, name: str) -> tuple[int, int]:
        """Gradients, and what is gathered, beside a moment's activations; the same whatever their number of rows."""
        gradients, gathered = 0, self.gathered(name)
        if self.recipe.grad_accumulation > 1:
            gradients = self.divided(self.trained)
        elif name.startswith("first block") or name == "embedding":
            gradients = self.divided(self.trained - (self.rest if self.terms.trains_base else 0))
        if "block" in name:
            gradients += self.block_gradients
            gathered += self.block_gradients * self.stored_bytes // self.terms.weight_bytes
        elif name == "embedding":
            gathered = max(gathered, self.stored_bytes * self.rest)  # freed before the gradients' copy is made
        if self.terms.trains_base and name not in ("loss", "forward"):
            gradients += self.rest_gradients(both=name == "embedding")
        return gradients, gathered

    def ledger(
        self, *, activations: int = 0, loss: int = 0, gradients: int = 0, gathered: int = 0, workspace: int = 0
    ) -> Ledger:
        return Ledger(
            weights=self.weights,
            optimizer=self.states // self.ranks,
            activations=activations,
            loss=loss,
            gradients=gradients,
            gathered=gathered,
            workspace=workspace,
        )

    def gathered(self, name: str) -> int:
        """The rest, and blocks: before backward the last alone under ZeRO-3, in it also the one that is next."""
        if name == "embedding":
            blocks = 0
        elif self.recipe.parallel.sharding == "zero2":
            blocks = 1 if name.startswith("first block") else self.num_blocks
        else:
            blocks = 2 if "block" in name else 1
        return self.terms.weight_bytes * self.rest + min(blocks, self.num_blocks) * self.block_bytes

    def rest_gradients(self, *, both: bool) -> int:
        """Of the head from its backward on, of the embedding at the very end; not divided before backward ends."""
        tables = 1 if self.terms.parts.tied_head or not both else 2
        return self.terms.weight_bytes * tables * self.terms.parts.embedding_parameters

    @property
    def ranks(self) -> int:
        """That share one copy of the parameters: all, or (HSDP) those of a node."""
        return self.recipe.parallel.state_shards

    @property
    def stored_bytes(self) -> int:
        return FP32 if self.recipe.plain_format == "fp32" else self.terms.weight_bytes

    @property
    def weights(self) -> int:
        """This rank's share; what belongs to packed codes (scales) is whole on each."""
        plain, codes, whole = self.spec.num_parameters + self.adapters, 0, 0
        for count, linear in self._packed:
            plain -= count * linear.num_weights
            codes += count * code_bytes(linear, self.recipe.precision)
            whole += count * packed_bytes(linear, self.recipe.precision)
        return (self.stored_bytes * plain + codes) // self.ranks + whole - codes

    @property
    def _packed(self) -> list[tuple[int, Linear]]:
        return packed_linears(self.terms.parts) if self.terms.packed else []

    @property
    def adapters(self) -> int:
        t = self.terms
        return sum(stack.num_blocks * t.adapter_parameters(stack.block) for stack in t.parts.stacks)

    @property
    def trained(self) -> int:
        return self.spec.num_parameters if self.terms.trains_base else self.adapters

    def divided(self, parameters: int) -> int:
        """Bytes of this rank's share of gradients."""
        return self.stored_bytes * parameters // self.ranks

    @property
    def states(self) -> int:
        """Of all ranks: in the format of what is updated, and FP32 masters where there are any."""
        cost = state_cost(self.recipe.optimizer)
        if self.recipe.precision.master == "fp32" and self.stored_bytes < FP32:
            return self.trained * FP32 + cost.state_bytes(self.trained, FP32)
        stepped = self.stored_bytes * self.trained if self.recipe.memory.offload == "optimizer" else 0  # copies
        return stepped + cost.state_bytes(self.trained, self.stored_bytes)

    @property
    def num_blocks(self) -> int:
        return sum(stack.num_blocks for stack in self.terms.parts.stacks)

    @property
    def block(self) -> int:
        """Parameters of the largest block, adapters counted in."""
        return max(self._block_parameters(stack) for stack in self.terms.parts.stacks)

    @property
    def block_bytes(self) -> int:
        """Of it, gathered: packed codes as they are."""
        t, precision = self.terms, self.recipe.precision
        packed = [linear for _, linear in self._packed]
        largest = 0
        for stack in t.parts.stacks:
            codes = [linear for linear in stack.block.linears if linear in packed]
            plain = self._block_parameters(stack) - sum(linear.num_weights for linear in codes)
            nbytes = t.weight_bytes * plain + sum(code_bytes(linear, precision) for linear in codes)
            largest = max(largest, nbytes)
        return largest

    def _block_parameters(self, stack: Stack) -> int:
        adapters = self.terms.adapter_parameters(stack.block)
        return sum(line.num_parameters for line in stack.block.linears) + adapters

    @property
    def block_gradients(self) -> int:
        t = self.terms
        trained = self.block if t.trains_base else max(t.adapter_parameters(stack.block) for stack in t.parts.stacks)
        return t.weight_bytes * trained

    @property
    def rest(self) -> int:
        """Parameters outside of the blocks."""
        parts = self.terms.parts
        return (1 if parts.tied_head else 2) * parts.embedding_parameters
