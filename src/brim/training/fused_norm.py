"""RMS norms that keep what fused kernels keep (Liger, unsloth): the input in its own format, one FP32 number a row.

transformers writes the norm in operators, which keep the input once more in FP32. Shapes: H hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from brim.layers import fused


def fuse_norms(model: nn.Module) -> None:
    """Every plain RMS norm (`weight` and `variance_epsilon`) of the model; others (Gemma's) stay as they are."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = _forward(module)


def _forward(module: Any) -> Any:
    def forward(hidden: Tensor) -> Tensor:
        out: Tensor = _RMSNorm.apply(hidden, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
        return out

    return forward


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        out, rstd = fused.norm(hidden, weight_H, epsilon)
        ctx.save_for_backward(hidden, weight_H, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_H, rstd = ctx.saved_tensors
        trains_weight = ctx.needs_input_grad[1]
        return (*fused.norm_backward(gradients[0], hidden, weight_H, rstd, trains_weight=trains_weight), None)
