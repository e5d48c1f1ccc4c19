"""INT8 and INT4 whose scales are searched for the least squared error. Shapes: R rows, K elements of a row."""

from collections.abc import Callable

import torch
from torch import Tensor

from brim.checkpoints.conversion import Encoded
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import compare
from brim.numerics.encode import decode, encode_integer
from brim.numerics.granularity import Granularity
from brim.numerics.scales import least_error_scale

WORK_BYTES = 64
"""For each element: quotient, codes, error and their products in FP32, decoded, and up to eight bytes for its bits."""

Finish = Callable[[Tensor], Tensor]
"""int8 codes (R, K) as a layout holds them."""


def unpacked(codes_RK: Tensor) -> Tensor:
    """A byte each."""
    return codes_RK


def encode_searched(
    block_RK: Tensor,
    scratch: Scratch,
    *,
    format: str,
    granularity: Granularity,
    scale_dtype: torch.dtype,
    finish: Finish,
) -> Encoded:
    """Codes and scales, one for each group of a row."""
    encoded = encode_integer(
        block_RK, format=format, granularity=granularity, scale_dtype=scale_dtype, choose=least_error_scale
    )
    decoded_RK = decode(encoded.codes, encoded.scale, granularity=granularity)
    sums = compare(block_RK, decoded_RK, scratch, clipped=encoded.num_clipped, scale=encoded.scale)
    if block_RK.dtype == torch.float64:
        sums.overflowed = max(sums.overflowed, int(torch.isinf(block_RK.float()).sum()))
    return Encoded((finish(encoded.codes), encoded.scale), sums, lambda: decoded_RK)
