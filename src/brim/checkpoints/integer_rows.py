"""INT8 with a scale per row, in few passes over a block that stays in the processor's cache.

The codes and scales are those of `numerics.encode.encode_integer`, bit by bit. How this differs: it writes into memory
that is there already, clips only where a scale leaves something to clip, and has the sums for the report from values
that it needs anyway. Shapes: R rows, K elements of a row.
"""

import numpy as np
import torch
from torch import Tensor

from brim.checkpoints.conversion import Encoded
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import Statistics, compare, count_nonzero, largest_of_rows, widened
from brim.numerics.encode import decode, encode_integer, storable_scale
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import PerChannel

_LARGEST = FORMATS["int8"].codes[1]


def encode_rows(block_RK: Tensor, scratch: Scratch, *, scale_dtype: torch.dtype) -> Encoded:
    """Codes (R, K) and scales (R, 1)."""
    if block_RK.dtype == torch.float64:
        return _encode_double(block_RK, scratch, scale_dtype)
    values_RK = widened(block_RK, scratch)
    top_R1 = largest_of_rows(values_RK).unsqueeze(-1)
    stored_R1 = storable_scale(top_R1 / _LARGEST, largest_code=_LARGEST, dtype=scale_dtype)
    scale_R1 = stored_R1.float()
    scaled_RK = torch.div(values_RK, scale_R1, out=scratch.take("scaled", block_RK.shape, torch.float32))
    rounded_RK = torch.round(scaled_RK, out=scratch.take("rounded", block_RK.shape, torch.float32))
    clipped = 0
    # The largest element of a row has the largest code.
    if bool(((top_R1 / scale_R1).round_() > _LARGEST).any()):
        clipped = int((rounded_RK.abs() > _LARGEST).sum())
        rounded_RK.clamp_(-_LARGEST, _LARGEST)
    codes_RK = scratch.take("codes", block_RK.shape, torch.int8).copy_(rounded_RK)
    sums = Statistics(elements=block_RK.numel(), clipped=clipped)
    sums.largest, sums.zero_rows = float(top_R1.max()), int((top_R1 == 0).sum())
    sums.scale_min, sums.scale_max = float(scale_R1.min()), float(scale_R1.max())
    # In steps of the code first, where no square leaves FP32's range, then times the scale in FP64.
    wide_R = scale_R1.squeeze(-1).double()
    sums.signal = _energy(scaled_RK, wide_R)
    error_RK = rounded_RK.sub_(scaled_RK)
    sums.noise = _energy(error_RK, wide_R)
    sums.largest_error = float((largest_of_rows(error_RK) * wide_R).max())
    nonzero, sums.subnormal = count_nonzero(block_RK, scratch)
    sums.zeroed = nonzero - int(np.count_nonzero(codes_RK.numpy()))
    return Encoded((codes_RK, stored_R1), sums)


def _energy(values_RK: Tensor, scale_R: Tensor) -> float:
    """The sum of (value * scale)^2."""
    return float((torch.linalg.vector_norm(values_RK, dim=-1).double() * scale_R).square_().sum())


def _encode_double(block_RK: Tensor, scratch: Scratch, scale_dtype: torch.dtype) -> Encoded:
    encoded = encode_integer(block_RK, granularity=PerChannel(), scale_dtype=scale_dtype)
    decoded = decode(encoded.codes, encoded.scale, granularity=PerChannel())
    sums = compare(block_RK, decoded, scratch, clipped=encoded.num_clipped, scale=encoded.scale)
    past = int(torch.isinf(block_RK.float()).sum())
    sums.overflowed = max(sums.overflowed, past)
    return Encoded((encoded.codes, encoded.scale), sums)
