"""MXFP4 as the Open Compute Project's Microscaling Formats (MX) 1.0 have it: 32 elements share a power of two.

The exponent is that of the block's largest element less that of the element format's largest value, 6 = 1.5 * 2^2
(section 6.3); elements are rounded to the nearest FP4 E2M1 value, half to even, and what lies past 6 becomes 6.
Shapes: R rows, K elements of a row, N blocks of a row (K / 32), B = 32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from brim.numerics.formats import FORMATS

_ROW = FORMATS["mxfp4"]
BLOCK = _ROW.block
_BIAS = 127
_VALUES = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
"""Of the codes without sign."""


class Blocks(NamedTuple):
    """Decoded, an element is its code's value times 2^(exponent - 127)."""

    codes: Tensor
    """uint8 (R, K): sign, exponent, fraction in the four lower bits."""
    exponents: Tensor
    """uint8 (R, N)."""
    num_clipped: int
    """Elements past the largest value by more than half a step."""


def encode_blocks(values_RK: Tensor) -> Blocks:
    """Of rows whose length is a multiple of 32, finite."""
    values_RNB = values_RK.float().unflatten(-1, (-1, BLOCK))
    exponent_RN1 = _exponents(values_RNB)
    scaled_RNB = torch.ldexp(values_RNB, -exponent_RN1)
    codes_RNB = _codes(scaled_RNB.abs())
    num_clipped = int((scaled_RNB.abs() > _PAST).sum())
    codes_RNB |= torch.signbit(scaled_RNB).to(torch.uint8) << 3
    exponents = (exponent_RN1 + _BIAS).to(torch.uint8).squeeze(-1)
    return Blocks(codes_RNB.flatten(-2), exponents, num_clipped)


def decode_blocks(blocks: Blocks) -> Tensor:
    """fp32 (R, K)."""
    codes_RNB = blocks.codes.unflatten(-1, (-1, BLOCK)).int()
    size_RNB = _VALUES[codes_RNB & 7]
    signed_RNB = torch.where(codes_RNB >= 8, -size_RNB, size_RNB)
    exponent_RN1 = blocks.exponents.int().unsqueeze(-1) - _BIAS
    return torch.ldexp(signed_RNB, exponent_RN1).flatten(-2)


def pack_nibbles(codes_RK: Tensor) -> Tensor:
    """uint8 (R, K / 2): the earlier of two codes in the lower half."""
    pairs = codes_RK.unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 (R, K)."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


_PAST = _ROW.largest + 1
"""Half a step past the largest value, were there a next one, 8."""


def _exponents(values_RNB: Tensor) -> Tensor:
    """int32 (R, N, 1); 0 for a block of zeros."""
    top_RN1 = values_RNB.abs().amax(dim=-1, keepdim=True)
    # frexp's fraction is in [1/2, 1), so its exponent is one too many.
    exponent_RN1 = torch.frexp(top_RN1).exponent - 1 - _ROW.max_exponent
    return torch.where(top_RN1 == 0, 0, exponent_RN1.clamp(-_BIAS, _BIAS))


def _codes(size: Tensor) -> Tensor:
    """uint8 codes of sizes. Below 2 the step is 1/2, below 4 it is 1, then 2: where one of these three grids is too
    fine, its code is past those of the coarser ones; where too coarse, past those of the finer ones."""
    fine = torch.round(size * 2)
    torch.minimum(fine, torch.round(size).add_(2), out=fine)
    torch.minimum(fine, torch.round(size / 2).add_(4), out=fine)
    return fine.clamp_(max=7).to(torch.uint8)
