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
from brim.checkpoints.statistics import RowSums, compare, count_nonzero, largest_of_rows, widened
from brim.numerics.encode import decode, encode_integer, storable_scale
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import PerChannel

_LARGEST = FORMATS["int8"].codes[1]


def encode_rows(block_RK: Tensor, scratch: Scratch, *, scale_dtype: torch.dtype) -> Encoded:
    """Codes (R, K) and scales (R,)."""
    if block_RK.dtype == torch.float64:
        return _encode_double(block_RK, scratch, scale_dtype)
    values_RK = widened(block_RK, scratch)
    top_R = largest_of_rows(values_RK)
    stored_R = storable_scale(top_R / _LARGEST, largest_code=_LARGEST, dtype=scale_dtype)
    scale_R = stored_R.float()
    scaled_RK = scratch.take("scaled", block_RK.shape, torch.float32)
    rounded_RK = scratch.take("rounded", block_RK.shape, torch.float32)
    torch.div(values_RK, scale_R.unsqueeze(-1), out=scaled_RK)
    torch.round(scaled_RK, out=rounded_RK)
    # The largest element of a row has the largest code. A scale in FP32 is too near absmax/127 to leave one past 127.
    clips = scale_dtype != torch.float32 and bool(((top_R / scale_R).round_() > _LARGEST).any())
    clipped = _clip(rounded_RK) if clips else 0
    codes_RK = scratch.take("codes", block_RK.shape, torch.int8).copy_(rounded_RK)
    signal_R = torch.linalg.vector_norm(scaled_RK, dim=-1)
    error_RK = rounded_RK.sub_(scaled_RK)
    nonzero, subnormal = count_nonzero(block_RK, scratch)
    sums = RowSums(
        elements=block_RK.numel(),
        subnormal=subnormal,
        clipped=clipped,
        zeroed=nonzero - int(np.count_nonzero(codes_RK.numpy())),
        top_R=top_R,
        scale_R=scale_R,
        signal_R=signal_R,
        noise_R=torch.linalg.vector_norm(error_RK, dim=-1),
        error_R=largest_of_rows(error_RK),
    )
    return Encoded((codes_RK, stored_R), sums)


def _clip(rounded_RK: Tensor) -> int:
    """Keep to the codes; how many elements were past them."""
    clipped = int((rounded_RK.abs() > _LARGEST).sum())
    rounded_RK.clamp_(-_LARGEST, _LARGEST)
    return clipped


def _encode_double(block_RK: Tensor, scratch: Scratch, scale_dtype: torch.dtype) -> Encoded:
    encoded = encode_integer(block_RK, granularity=PerChannel(), scale_dtype=scale_dtype)
    decoded = decode(encoded.codes, encoded.scale, granularity=PerChannel())
    sums = compare(block_RK, decoded, scratch, clipped=encoded.num_clipped, scale=encoded.scale)
    past = int(torch.isinf(block_RK.float()).sum())
    sums.overflowed = max(sums.overflowed, past)
    return Encoded((encoded.codes, encoded.scale), sums)
