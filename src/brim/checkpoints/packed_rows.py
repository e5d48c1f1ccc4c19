"""INT4 and INT8 with a scale per group or row, packed into words. Shapes: R rows, K elements of a row."""

import torch
from torch import Tensor

from brim.checkpoints.conversion import Encoded
from brim.checkpoints.integer_rows import encode_rows
from brim.checkpoints.layouts.pack_quantized import pack
from brim.checkpoints.scratch import Scratch
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import Granularity

WORK_BYTES = 24
"""For each element: its code, thrice, and up to eight bytes for its bits, twice."""


def encode_packed(
    block_RK: Tensor, scratch: Scratch, *, format: str, granularity: Granularity, scale_dtype: torch.dtype
) -> Encoded:
    """Words (R, K * bits / 32) and scales, one for each group of a row."""
    encoded = encode_rows(block_RK, scratch, scale_dtype=scale_dtype, format=format, granularity=granularity)
    codes_RK, scale_S = encoded.parts
    words = pack(codes_RK, bits=FORMATS[format].element_bits)
    return Encoded((words, scale_S), encoded.statistics, encoded.decoded)
