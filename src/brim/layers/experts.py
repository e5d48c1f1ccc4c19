"""Which modules of a model are experts of a mixture, and which of them can be packed."""

from collections.abc import Iterator

from torch import nn
from transformers.integrations.moe import _default_apply_gate

from brim.layers.packed_experts import DOWN, GATE_UP

_PLAIN = {
    "has_gate": True, "has_bias": False, "has_post_expert_norm": False, "is_transposed": False, "is_concatenated": True,
}  # fmt: skip
"""transformers' own words for the convention that `layers.packed_experts` computes."""


def are_packable(module: nn.Module) -> bool:
    """Experts as in Mixtral, Qwen-MoE, OLMoE or DeepSeek-V3: gate above up, no bias, an activation and no more."""
    if any(getattr(module, name, None) is not value for name, value in _PLAIN.items()):
        return False
    parameters = dict(module.named_parameters(recurse=False))
    if parameters.keys() != {GATE_UP, DOWN} or getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return False
    experts, hidden, intermediate = parameters[DOWN].shape
    return parameters[GATE_UP].shape == (experts, 2 * intermediate, hidden)


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules, with their names, that hold the weights of several experts in one tensor."""
    for name, module in model.named_modules():
        named_so = "experts" in type(module).__name__.lower() or hasattr(module, "num_experts")
        if named_so and any(tensor.dim() == 3 for tensor in module.parameters(recurse=False)):
            yield name, module
