"""What a mixture's experts add where the closed form has no row for its family. No torch."""

from dataclasses import dataclass

from brim.models.spec import ModelSpec
from brim.recipe import Recipe

_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")
"""Words for how many experts a block has."""
_OWN_LAYOUT = frozenset({"gpt_oss"})
"""Neither packed (`training.packed_base`) nor adapted (PEFT's utils/transformers_weight_conversion.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    num_blocks: int
    """That have experts."""
    num_experts: int
    hidden_size: int
    width: int
    visited: int
    """Experts, by a token."""
    shared_width: int
    """Of the experts that all tokens visit, as one."""
    has_own_layout: bool

    @property
    def num_weights(self) -> int:
        """Of one block's experts: gate, up and down."""
        return 3 * self.num_experts * self.hidden_size * self.width

    def adapter_parameters(self, rank: int) -> int:
        """Of one block: gate and up are one tensor, and adapted with twice the rank."""
        each = 2 * (self.hidden_size + 2 * self.width) + self.hidden_size + self.width
        return 0 if self.has_own_layout else rank * self.num_experts * each

    def routed_elements(self, recipe: Recipe) -> int:
        """Of a token, beside what its experts' widths take: what each gives and, where they learn, what each is given;
        gate, act(gate), up and their product of the shared ones."""
        learns = recipe.trains_weights or (recipe.adapts and not recipe.precision.packed)
        return (1 + learns) * self.visited * self.hidden_size + 4 * self.shared_width

    def merged_weights(self, recipe: Recipe) -> int:
        """PEFT adds adapters to the weights of all experts before their product, which keeps the sums of a block."""
        return self.num_weights if recipe.adapts and not recipe.precision.packed and not self.has_own_layout else 0


def mixture(spec: ModelSpec) -> Mixture | None:
    """None for a model without experts."""
    key = next((key for key in _COUNTS if spec.config.get(key)), None)
    if key is None:
        return None
    return Mixture(
        num_blocks=spec.num_layers - int(spec.config.get("first_k_dense_replace") or 0),
        num_experts=spec.first(key),
        hidden_size=spec.hidden_size,
        width=spec.first("moe_intermediate_size", default=spec.intermediate_size),
        visited=spec.first("num_experts_per_tok", default=1),
        shared_width=int(spec.config.get("n_shared_experts") or 0) * spec.first("moe_intermediate_size", default=1),
        has_own_layout=spec.model_type in _OWN_LAYOUT,
    )
