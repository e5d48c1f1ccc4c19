"""INT4 and INT8 with a scale per group or row, packed into words. Shapes: R rows, K elements of a row."""

import torch
from torch import Tensor

from brim.checkpoints.conversion import Encoded
from brim.checkpoints.layouts.pack_quantized import pack
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import compare
from brim.numerics.encode import decode, encode_integer
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import Granularity

WORK_BYTES = 48
"""For each element: quotient, codes, decoded and error in FP32, and up to eight bytes for its bits."""


def encode_packed(
    block_RK: Tensor, scratch: Scratch, *, format: str, granularity: Granularity, scale_dtype: torch.dtype
) -> Encoded:
    """Words (R, K * bits / 32) and scales, one for each group of a row."""
    encoded = encode_integer(block_RK, format=format, granularity=granularity, scale_dtype=scale_dtype)
    decoded_RK = decode(encoded.codes, encoded.scale, granularity=granularity)
    sums = compare(block_RK, decoded_RK, scratch, clipped=encoded.num_clipped, scale=encoded.scale)
    if block_RK.dtype == torch.float64:
        sums.overflowed = max(sums.overflowed, int(torch.isinf(block_RK.float()).sum()))
    return Encoded((pack(encoded.codes, bits=FORMATS[format].element_bits), encoded.scale), sums)
