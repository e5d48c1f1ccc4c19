"""INT8 and INT4 with one scale for the whole tensor, known beforehand. Shapes: R rows, K elements of a row."""

import torch
from torch import Tensor

from brim.checkpoints.conversion import Encoded
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.searched_rows import Finish
from brim.checkpoints.statistics import compare
from brim.numerics.formats import FORMATS

WORK_BYTES = 48
"""For each element: quotient, decoded and error in FP32, comparisons, codes, and up to eight bytes for its bits."""


def encode_shared(block_RK: Tensor, scratch: Scratch, *, format: str, scale: Tensor, finish: Finish) -> Encoded:
    """Codes, as the layout holds them; the scale is a constant of the conversion."""
    low, high = FORMATS[format].codes
    rounded_RK = (block_RK.float() / scale.float()).round_()
    clipped = int(((rounded_RK < low) | (rounded_RK > high)).sum())
    codes_RK = rounded_RK.clamp_(low, high).to(torch.int8)
    decoded_RK = rounded_RK * scale.float()
    sums = compare(block_RK, decoded_RK, scratch, clipped=clipped, scale=scale)
    if block_RK.dtype == torch.float64:
        sums.overflowed = max(sums.overflowed, int(torch.isinf(block_RK.float()).sum()))
    return Encoded((finish(codes_RK),), sums, lambda: decoded_RK)
