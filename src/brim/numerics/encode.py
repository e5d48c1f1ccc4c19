"""Reference encoding of tensors: float casts, and integers by absmax scale. Plain torch, vectorised, any device.

Shapes: R output channels, K inputs, G groups of a row, B elements that share a scale.
"""

import math
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from brim.numerics.formats import FORMATS
from brim.numerics.granularity import Granularity, PerChannel, PerGroup

TORCH_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Float formats that torch holds, by Brim's name."""


class Encoded(NamedTuple):
    """A weight as integers: decoded, it is `codes * scale`."""

    codes: Tensor
    """int8, shaped as the weight."""
    scale: Tensor
    """Shaped as the granularity says."""
    num_clipped: int
    """Elements that lay past the last code: a scale that its own format rounded down leaves a few."""


class EncodedBetween(NamedTuple):
    """A weight as integers whose zero is a code of its own: decoded, it is `(codes - zero) * scale`."""

    codes: Tensor
    """int8, shaped as the weight."""
    scale: Tensor
    zero: Tensor
    """int8; shaped, as the scale, as the granularity says."""
    num_clipped: int
    """Elements that lay past the last code by half a step or more: a scale rounded down leaves some."""


class ChooseScale(Protocol):
    """Fits scales to blocks."""

    def __call__(self, blocks: Tensor, *, codes: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """(..., B) -> (..., 1), as `storable_scale` leaves them."""


def all_codes(format: str) -> tuple[int, int]:
    """Least and greatest code that an integer format's bits hold: absmax scales leave INT4's -8 unused. INT8 keeps to
    -127: kernels that multiply two INT8 codes in 16 bits (AVX2's vpmaddubsw) overflow with -128."""
    low, high = FORMATS[format].codes
    return (low if high > 7 else -high - 1), high


def bit_codes(format: str) -> tuple[int, int]:
    """Least and greatest code of two's complement: what zero points have use for, INT8's -128 too."""
    bits = FORMATS[format].element_bits
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def encode_integer(
    weight_RK: Tensor,
    *,
    format: str = "int8",
    granularity: Granularity | None = None,
    scale_dtype: torch.dtype = torch.float32,
    choose: ChooseScale | None = None,
) -> Encoded:
    """Symmetric integers: scale = absmax / last code, codes rounded half to even (granularity None: per channel).

    The scale is rounded to `scale_dtype` first and the codes are made with it as stored. Where it would be zero
    it is 1, and the codes are zero; it is never so large that the last code decodes to more than its dtype holds.
    `choose` fits other scales; codes then go down to the least that the bits have, which absmax has no use for.
    """
    granularity = PerChannel() if granularity is None else granularity
    low, high = FORMATS[format].codes if choose is None else all_codes(format)
    # fp32: in bf16 the quotient would be off by up to half a code.
    blocks = _as_blocks(weight_RK.float(), granularity)
    if choose is None:
        scale = absmax_scale(blocks, largest_code=high, dtype=scale_dtype)
    else:
        scale = choose(blocks, codes=(low, high), dtype=scale_dtype)
    rounded = (blocks / scale.float()).round_()
    num_clipped = int(((rounded < low) | (rounded > high)).sum())
    codes = rounded.clamp_(low, high).to(torch.int8).view(weight_RK.shape)
    return Encoded(codes, scale.view(granularity.scale_shape(_matrix_shape(weight_RK))), num_clipped)


def encode_between(
    weight_RK: Tensor,
    *,
    format: str = "int8",
    granularity: Granularity | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> EncodedBetween:
    """Asymmetric integers: the first code is the least element and the last one the greatest (or 0, which always has a
    code), codes rounded half to even as compressed-tensors rounds them (granularity None: per channel)."""
    granularity = PerChannel() if granularity is None else granularity
    low, high = bit_codes(format)
    blocks = _as_blocks(weight_RK.float(), granularity)
    least, greatest = blocks.amin(dim=-1, keepdim=True).clamp_(max=0), blocks.amax(dim=-1, keepdim=True).clamp_(min=0)
    # Divided before they are subtracted: the difference may leave FP32's range.
    step = greatest / (high - low) - least / (high - low)
    scale = storable_scale(step, largest_code=high - low, dtype=scale_dtype)
    zero = (low - least / scale.float()).round_().clamp_(low, high)
    rounded = (blocks / scale.float()).add_(zero).round_()
    num_clipped = int(((rounded < low) | (rounded > high)).sum())
    codes = rounded.clamp_(low, high).to(torch.int8).view(weight_RK.shape)
    shape = granularity.scale_shape(_matrix_shape(weight_RK))
    return EncodedBetween(codes, scale.view(shape), zero.to(torch.int8).view(shape), num_clipped)


def decode_between(codes_RK: Tensor, scale: Tensor, zero: Tensor, *, granularity: Granularity | None = None) -> Tensor:
    """fp32 values of asymmetric codes (granularity None: per channel)."""
    blocks = _as_blocks(codes_RK.float(), PerChannel() if granularity is None else granularity)
    shape = (*blocks.shape[:-1], 1)
    return ((blocks - zero.float().reshape(shape)) * scale.float().reshape(shape)).view(codes_RK.shape)


def decode(codes_RK: Tensor, scale: Tensor, *, granularity: Granularity | None = None) -> Tensor:
    """fp32 values of integer codes (granularity None: per channel)."""
    blocks = _as_blocks(codes_RK.float(), PerChannel() if granularity is None else granularity)
    return (blocks * scale.float().reshape(*blocks.shape[:-1], 1)).view(codes_RK.shape)


def absmax_scale(blocks: Tensor, *, largest_code: float, dtype: torch.dtype) -> Tensor:
    """(..., B) -> (..., 1): the largest element of each block maps to `largest_code`."""
    scale = blocks.abs().amax(dim=-1, keepdim=True) / largest_code
    return storable_scale(scale, largest_code=largest_code, dtype=dtype)


def storable_scale(scale: Tensor, *, largest_code: float, dtype: torch.dtype) -> Tensor:
    """The scale as stored: in its dtype, 1 where it would be 0, and no larger than leaves the last code finite."""
    stored = scale.clamp(max=_largest_scale(largest_code, dtype)).to(dtype)
    return torch.where(stored == 0, torch.ones_like(stored), stored)


@cache
def _largest_scale(largest_code: float, dtype: torch.dtype) -> float:
    """The largest scale of this dtype whose last code is still finite in it: readers decode in the scale's dtype.

    Without a tensor: a rehearsal's is fake, and what it says of one (1.0) would be kept for real weights.
    """
    finest = torch.finfo(dtype)
    scale = finest.max / largest_code
    step = math.ldexp(finest.eps, math.frexp(scale)[1] - 1)
    below = math.floor(scale / step) * step
    return below if below * largest_code <= finest.max else below - step  # of FP64, the quotient itself is rounded


def _as_blocks(weight_RK: Tensor, granularity: Granularity) -> Tensor:
    match granularity:
        case PerGroup(size):
            granularity.scale_shape(_matrix_shape(weight_RK))
            return weight_RK.unflatten(-1, (-1, size))
        case PerChannel():
            return weight_RK
        case _:
            return weight_RK.flatten()


def _matrix_shape(weight_RK: Tensor) -> tuple[int, int]:
    rows, inputs = weight_RK.shape
    return rows, inputs
