"""Peak bytes of any family's training step, roughly: for ranking where the closed form has no row.

Weights, gradients and optimizer states follow from the number of parameters; what a block keeps is that of a usual
block of this width. Good enough to say which recipes are worth a rehearsal, which then decides.
"""

from dataclasses import dataclass

from brim.memory import scan
from brim.memory.families import FAMILIES
from brim.memory.mixture import Mixture, mixture
from brim.memory.packed import matrix_bytes
from brim.memory.states import state_cost
from brim.models.spec import ModelSpec
from brim.recipe import Recipe
from brim.report import Ledger

ERROR_BAND = (-0.5, 1.0)
"""Relative error (low, high) over the families and recipes of tests/cpu/test_families.py."""

_CHUNK_BYTES = 3 * 32 * 2**20
"""Logits, their FP32 copy and their gradient, of one chunk of the chunked loss."""


def closed_form_knows(spec: ModelSpec, recipe: Recipe) -> bool:
    """Whether `closed_form` and the roofline have rows for this model and head."""
    return spec.model_type in FAMILIES and recipe.task == spec.task != "sequence-classification"


def rough(spec: ModelSpec, recipe: Recipe) -> Ledger:
    """The largest of three moments: all activations with the logits, all with what the last block passes on in
    backward, or all gradients with one block's activations. Micro-batches find the gradients of earlier ones."""
    parts = _Parts(spec=spec, recipe=recipe)
    waiting = parts.gradients if scan.scans(spec) and recipe.grad_accumulation > 1 else 0
    again = parts.block if scan.scans(spec) and recipe.memory.activation_checkpointing != "none" else 0
    activations, loss, gradients = max(
        (parts.activations - again, parts.loss, waiting),
        (parts.activations + parts.passing, 0, waiting),
        (parts.block + parts.passing, 0, parts.gradients),
        key=sum,
    )
    return Ledger(
        weights=parts.weights,
        optimizer=parts.optimizer,
        activations=activations,
        loss=loss,
        gradients=gradients,
    )


def trained_parameters(spec: ModelSpec, recipe: Recipe) -> int:
    """All of them, or an adapter on each linear of a usual block."""
    if recipe.trains_weights:
        return spec.num_parameters
    usual = recipe.lora.rank * spec.num_layers * (8 * spec.hidden_size + 3 * (spec.hidden_size + _feed_width(spec)))
    experts = mixture(spec)
    if experts is None or recipe.precision.packed or recipe.lora.targets != ("all-linear",):
        return usual
    return usual + experts.num_blocks * experts.adapter_parameters(recipe.lora.rank)


def block_bytes(spec: ModelSpec, recipe: Recipe) -> int:
    """What one block keeps for backward, or makes again in it."""
    return _Parts(spec=spec, recipe=recipe).block


def kept_bytes(spec: ModelSpec, recipe: Recipe) -> int:
    """What all blocks keep for backward: under checkpointing, their inputs."""
    parts = _Parts(spec=spec, recipe=recipe)
    checkpointed = recipe.memory.activation_checkpointing != "none"
    return spec.num_layers * (parts.boundary if checkpointed else parts.block)


def table_bytes(spec: ModelSpec, recipe: Recipe) -> int:
    """Of the weights outside of blocks: the embedding and, where it is another, the head."""
    parts = _Parts(spec=spec, recipe=recipe)
    return parts.weight_bytes * parts.tables


def weights_of_blocks(spec: ModelSpec, recipe: Recipe) -> int:
    """Bytes of all that is in blocks."""
    return _Parts(spec=spec, recipe=recipe).weights - table_bytes(spec, recipe)


def _feed_width(spec: ModelSpec) -> int:
    """Of a token's way through the feed-forward: with experts, of those it visits."""
    per_token = spec.config.get("num_experts_per_tok")
    if per_token is None:
        return spec.intermediate_size
    return int(per_token) * spec.first("moe_intermediate_size", default=spec.intermediate_size)


def _joined_width(spec: ModelSpec) -> int:
    """Of queries and keys that latent attention puts together, each of a part with positions and one without."""
    if spec.config.get("qk_nope_head_dim") is None:
        return 0
    return 2 * spec.num_heads * (spec.first("qk_nope_head_dim") + spec.first("qk_rope_head_dim"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    spec: ModelSpec
    recipe: Recipe

    @property
    def weight_bytes(self) -> int:
        return 4 if self.recipe.plain_format == "fp32" else 2

    @property
    def _compute_bytes(self) -> int:
        return 4 if self.recipe.precision.compute == "fp32" else 2

    @property
    def weights(self) -> int:
        adapters = 0 if self.recipe.trains_weights else trained_parameters(self.spec, self.recipe)
        packed = max(0, self.spec.num_parameters - self.tables) if self.recipe.precision.packed else 0
        if packed and self.mixture is not None and self.mixture.has_own_layout:
            packed -= self.mixture.num_blocks * self.mixture.num_weights
        held = matrix_bytes(packed, 1, self.recipe.precision) if packed else 0  # as if all were one matrix
        return self.weight_bytes * (self.spec.num_parameters - packed + adapters) + held

    @property
    def mixture(self) -> Mixture | None:
        return mixture(self.spec)

    @property
    def merged(self) -> int:
        """Bytes of one block's experts with their adapters added."""
        experts = self.mixture
        if experts is None or self.recipe.lora.targets != ("all-linear",):
            return 0
        return self.weight_bytes * experts.merged_weights(self.recipe)

    @property
    def tables(self) -> int:
        """Parameters outside of blocks."""
        return (1 if self.spec.tied_head else 2) * self.spec.vocab_size * self.spec.hidden_size

    @property
    def gradients(self) -> int:
        if self.recipe.optimizer.in_backward:  # at most those of one table, or of its two uses
            return 2 * self.weight_bytes * self.spec.vocab_size * self.spec.hidden_size
        return self.weight_bytes * trained_parameters(self.spec, self.recipe)

    @property
    def optimizer(self) -> int:
        has_master = self.recipe.precision.master == "fp32" and self.weight_bytes == 2
        trained, cost = trained_parameters(self.spec, self.recipe), state_cost(self.recipe.optimizer)
        if has_master:
            return 4 * trained + cost.state_bytes(trained, 4)
        copies = trained * self.weight_bytes if self.recipe.memory.offload == "optimizer" else 0
        return copies + cost.state_bytes(trained, self.weight_bytes)

    @property
    def _tokens(self) -> int:
        """Of a device's micro-batch."""
        return self.recipe.tokens_per_step // self.recipe.rows_per_step * self.recipe.micro_batch_size

    @property
    def block(self) -> int:
        """Bytes that one block keeps for backward."""
        recipe, spec = self.recipe, self.spec
        if scan.scans(spec):
            return scan.block_bytes(spec, self._tokens, self._compute_bytes, trained=recipe.trains_weights)
        width = 12 * spec.hidden_size + 4 * _feed_width(spec) + _joined_width(spec)
        if self.mixture is not None and not self.mixture.has_own_layout:
            width += self.mixture.routed_elements(recipe)
        linear = self._compute_bytes * self._tokens * width
        length = max(recipe.seq_len, recipe.target_len if recipe.task == "seq2seq-lm" else 0)
        scores = (4 + 2 * self._compute_bytes) * recipe.micro_batch_size * spec.num_heads * length**2
        return linear + (scores if recipe.memory.attention == "eager" else 0) + self.merged

    @property
    def passing(self) -> int:
        """Bytes beside it in its backward, where they are many."""
        return scan.passing_bytes(self.spec, self._tokens) if scan.scans(self.spec) else self.merged // 3

    @property
    def boundary(self) -> int:
        """Bytes of one block's input."""
        wide = scan.scans(self.spec) and self.spec.config.get("residual_in_fp32", True)
        return (4 if wide else self._compute_bytes) * self._tokens * self.spec.hidden_size

    @property
    def activations(self) -> int:
        linears = self._compute_bytes * self._tokens * (5 * self.spec.hidden_size + 2 * _feed_width(self.spec))
        if scan.scans(self.spec):
            linears = scan.linear_result_bytes(self.spec, self._tokens, self._compute_bytes)
        if self.recipe.memory.activation_checkpointing == "full":
            kept = self.spec.num_layers * self.boundary + self.block
        elif self.recipe.memory.activation_checkpointing == "selective":
            kept = self.spec.num_layers * (self.boundary + linears) + self.block
        else:
            kept = self.spec.num_layers * self.block
        # autocast keeps a BF16 copy of each weight until forward ends
        is_mixed = self.weight_bytes > self._compute_bytes
        return kept + (2 * self.spec.num_parameters if is_mixed else 0)

    @property
    def loss(self) -> int:
        recipe = self.recipe
        if recipe.task == "sequence-classification":
            return 0
        length = recipe.target_len if recipe.task == "seq2seq-lm" else recipe.seq_len
        whole = (8 + self._compute_bytes) * recipe.micro_batch_size * length * self.spec.vocab_size
        return min(whole, _CHUNK_BYTES) if recipe.memory.loss == "chunked" else whole
