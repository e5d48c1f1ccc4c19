"""What one kernel of Liger's or unsloth's computes, in operators; on a GPU none of these allocates what lies between.

`brim.memory.cuda` puts the kernels' sizes in their place. Shapes: H hidden size, D head.
"""

import torch
from torch import Tensor


def norm(hidden: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The RMS norm, and one FP32 number a row for backward."""
    rstd = (hidden.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (weight_H * (hidden * rstd).to(hidden.dtype)).to(hidden.dtype), rstd


def norm_backward(
    gradient: Tensor, hidden: Tensor, weight_H: Tensor, rstd: Tensor, *, trains_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the norm's input and of its weight."""
    wide, normed, grad_weight = gradient.float(), hidden.float() * rstd, None
    if trains_weight:
        grad_weight = (wide * normed).flatten(0, -2).sum(0).to(weight_H.dtype)
    wide = wide * weight_H
    wide = (wide - normed * (wide * normed).mean(-1, keepdim=True)) * rstd
    return wide.to(hidden.dtype), grad_weight


def turn(states: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn each head's pairs of numbers by an angle a position, where they lie: element i of D with i + D / 2."""
    first, second = states.chunk(2, dim=-1)
    states.copy_(states * cos + torch.cat((-second, first), dim=-1) * sin)
