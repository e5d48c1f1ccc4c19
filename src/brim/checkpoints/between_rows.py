"""INT4 and INT8 with zero points, packed into words. Shapes: R rows, K elements of a row, G scales of a row."""

import torch
from torch import Tensor

from brim.checkpoints.conversion import Encoded
from brim.checkpoints.layouts.pack_quantized import pack, pack_zeros
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import compare
from brim.numerics.encode import decode_between, encode_between
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import Granularity

WORK_BYTES = 56
"""For each element: quotient, codes, decoded and error in FP32, two comparisons, and up to eight bytes for its bits."""


def encode_packed_between(
    block_RK: Tensor, scratch: Scratch, *, format: str, granularity: Granularity, scale_dtype: torch.dtype
) -> Encoded:
    """Words (R, K * bits / 32), scales (R, G) and words of zero points (R * bits / 32, G)."""
    encoded = encode_between(block_RK, format=format, granularity=granularity, scale_dtype=scale_dtype)
    decoded_RK = decode_between(encoded.codes, encoded.scale, encoded.zero, granularity=granularity)
    sums = compare(block_RK, decoded_RK, scratch, clipped=encoded.num_clipped, scale=encoded.scale)
    if block_RK.dtype == torch.float64:
        sums.overflowed = max(sums.overflowed, int(torch.isinf(block_RK.float()).sum()))
    bits = FORMATS[format].element_bits
    parts = (pack(encoded.codes, bits=bits), encoded.scale, pack_zeros(encoded.zero, bits=bits))
    return Encoded(parts, sums, lambda: decoded_RK)
