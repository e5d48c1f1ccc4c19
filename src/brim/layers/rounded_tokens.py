"""A product's inputs as an INT8 product would read them: each token rounded by its own largest value.

    scale = max|x| / 127.5;  used = clip(round(x / scale), -128, 127) * scale

That is compressed-tensors' (0.20) dynamic, symmetric rounding by token, which readers of an exported model apply; its
largest value is half a step off at most. Nothing is clipped further, so its slope is taken as one everywhere.
"""

import torch
from torch import Tensor

_HALF_RANGE = 127.5


def rounded_tokens(input: Tensor) -> Tensor:
    """`input`, its last dimension rounded as one token, in its own format; by FP32 arithmetic."""
    exact = input.float()
    largest = exact.abs().amax(-1, keepdim=True)
    # a token of zeros: any scale will do
    scale = torch.where(largest > 0, largest / _HALF_RANGE, 1)
    return (exact / scale).round_().clamp_(-128, 127).mul_(scale).to(input.dtype)
