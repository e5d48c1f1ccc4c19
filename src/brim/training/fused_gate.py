"""Gated feed-forwards that keep what a fused kernel keeps (Liger, torch.compile): gate and up, and nothing between.

transformers writes silu(gate) * up in two operators, which keep silu(gate) as well.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brim.layers.one_kernel import one_kernel

_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def fuse_gates(model: nn.Module) -> None:
    """Every feed-forward of Llama's kind with SiLU; others stay as they are."""
    for module in model.modules():
        if all(hasattr(module, part) for part in _PARTS) and _is_silu(module.act_fn):
            module.forward = _forward(module)


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _forward(module: Any) -> Any:
    def forward(hidden: Tensor) -> Tensor:
        gated: Tensor = _GatedSiLU.apply(module.gate_proj(hidden), module.up_proj(hidden))  # type: ignore[no-untyped-call]
        out: Tensor = module.down_proj(gated)
        return out

    return forward


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    @one_kernel
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @one_kernel
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        up_gradient = F.silu(gate).mul_(gradients[0])
        gate_gradient = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return gate_gradient, up_gradient
