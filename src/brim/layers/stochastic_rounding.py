"""FP32 -> BF16 by chance: up or down with the odds of the distance, so that many small updates add up.

Rounded to nearest, a BF16 weight of 0.1 does not move for updates below 0.0002: fine-tuning at a small learning rate
then stands still. Rounded by chance it moves as far in the mean, without an FP32 copy (Gupta et al. 2015,
arXiv 1502.02551; Zamirai et al. 2020, arXiv 2010.06192). A BF16 number is the upper half of an FP32 one: a random lower
half is added and the lower half cut off.

Drawing bits for every element would take longer than AdamW itself: torch's generator is one thread. So few are drawn,
R + B for R x B elements, and element (r, b) has the bits of r xor those of b: any two elements' bits are independent,
which is all that the mean and the variance of a sum of roundings ask for.

Shapes: N elements, in R rows of B.
"""

from math import ceil, isqrt

import torch
from torch import Tensor

_LOW = 2**16 - 1
_ODD = 2**16 + 1
"""The last bit of each half: set, chance is in the middle of its step, and what is BF16 already stays."""


def noise_like(values_N: Tensor) -> Tensor:
    """32 bits for each element, from torch's generator: two halves, of 15 bits of chance each."""
    count = values_N.numel()
    width = isqrt(count) + 1
    bits_B = _drawn(width, values_N.device).bitwise_or_(_ODD)
    bits_R = _drawn(ceil(count / width), values_N.device).bitwise_and_(~_ODD)
    return (bits_R[:, None] ^ bits_B).view(-1)[:count].view(values_N.shape)


def round_by_chance(values_N: Tensor, noise_N: Tensor) -> Tensor:
    """`values_N` (FP32), each replaced by one of the two BF16 numbers around it.

    Writes over `values_N`, and shifts the half that it took out of `noise_N`.
    """
    bits_N = values_N.view(torch.int32)
    bits_N.add_(noise_N & _LOW).bitwise_and_(~_LOW)
    noise_N.bitwise_right_shift_(16)
    return values_N


def _drawn(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int32, device=device).random_(-(2**31), 2**31 - 1)
