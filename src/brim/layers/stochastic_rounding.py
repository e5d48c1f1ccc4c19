"""FP32 -> BF16 by chance: up or down with the odds of the distance, so that many small updates add up.

Rounded to nearest, a BF16 weight of 0.1 does not move for updates below 0.0002: fine-tuning at a small learning rate
then stands still. Rounded by chance it moves as far in the mean, without an FP32 copy (Gupta et al. 2015,
arXiv 1502.02551; Zamirai et al. 2020, arXiv 2010.06192). A BF16 number is the upper half of an FP32 one: a random lower
half is added and the lower half cut off.

Shapes: N elements.
"""

import torch
from torch import Tensor

_LOW = 2**16 - 1


def noise_like(values_N: Tensor) -> Tensor:
    """31 random bits for each element, from torch's generator: enough for two roundings."""
    return torch.empty_like(values_N, dtype=torch.int32).random_()


def round_by_chance(values_N: Tensor, noise_N: Tensor) -> Tensor:
    """`values_N` (FP32), each replaced by one of the two BF16 numbers around it.

    Writes over `values_N`, and shifts the 15 bits of chance that it took out of `noise_N`.
    """
    bits_N = values_N.view(torch.int32)
    # 15 bits of chance, twice their worth and in the middle of it: a number that is BF16 already stays what it is.
    bits_N.add_((noise_N & (_LOW >> 1)).mul_(2).add_(1)).bitwise_and_(~_LOW)
    noise_N.bitwise_right_shift_(16)
    return values_N
