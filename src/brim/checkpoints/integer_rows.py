"""Integers with a scale per row or group of a row, in few passes over a block that stays in the processor's cache.

The codes and scales are those of `numerics.encode.encode_integer`, bit by bit. How this differs: it writes into memory
that is there already, clips only where a scale leaves something to clip, and has the sums for the report from values
that it needs anyway. Shapes: R rows, K elements of a row, S scales, B elements that share one.
"""

import numpy as np
import torch
from torch import Tensor

from brim.checkpoints.conversion import Encoded
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import RowSums, compare, count_nonzero, largest_of_rows, widened
from brim.numerics.encode import decode, encode_integer, storable_scale
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import Granularity, PerChannel, PerGroup

_CHANNEL = PerChannel()


def encode_rows(
    block_RK: Tensor,
    scratch: Scratch,
    *,
    scale_dtype: torch.dtype,
    format: str = "int8",
    granularity: Granularity = _CHANNEL,
) -> Encoded:
    """Codes (R, K), a byte each, and scales (S,)."""
    if block_RK.dtype == torch.float64:
        return _encode_double(block_RK, scratch, scale_dtype, format, granularity)
    largest = FORMATS[format].codes[1]
    inputs = block_RK.shape[1]
    shape = (-1, granularity.size if isinstance(granularity, PerGroup) else inputs)
    values_SB = widened(block_RK, scratch).view(shape)
    top_S = largest_of_rows(values_SB)
    stored_S = storable_scale(top_S / largest, largest_code=largest, dtype=scale_dtype)
    scale_S = stored_S.float()
    scaled_SB = scratch.take("scaled", values_SB.shape, torch.float32)
    rounded_SB = scratch.take("rounded", values_SB.shape, torch.float32)
    torch.div(values_SB, scale_S.unsqueeze(-1), out=scaled_SB)
    torch.round(scaled_SB, out=rounded_SB)
    # The largest element of a row has the largest code. A scale in FP32 is too near absmax/127 to leave one past 127.
    clips = scale_dtype != torch.float32 and bool(((top_S / scale_S).round_() > largest).any())
    clipped = _clip(rounded_SB, largest) if clips else 0
    codes_SB = scratch.take("codes", values_SB.shape, torch.int8).copy_(rounded_SB)
    signal_S = torch.linalg.vector_norm(scaled_SB, dim=-1)
    error_SB = rounded_SB.sub_(scaled_SB)
    nonzero, subnormal = count_nonzero(block_RK, scratch)
    sums = RowSums(
        elements=block_RK.numel(),
        subnormal=subnormal,
        clipped=clipped,
        zeroed=nonzero - int(np.count_nonzero(codes_SB.numpy())),
        top_R=top_S,
        scale_R=scale_S,
        signal_R=signal_S,
        noise_R=torch.linalg.vector_norm(error_SB, dim=-1),
        error_R=largest_of_rows(error_SB),
        scales_per_row=inputs // values_SB.shape[1],
    )

    def decoded() -> Tensor:
        return (codes_SB * scale_S.unsqueeze(-1)).view(block_RK.shape)

    return Encoded((codes_SB.view(block_RK.shape), stored_S), sums, decoded)


def _clip(rounded_SB: Tensor, largest: int) -> int:
    """Keep to the codes; how many elements were past them."""
    clipped = int((rounded_SB.abs() > largest).sum())
    rounded_SB.clamp_(-largest, largest)
    return clipped


def _encode_double(
    block_RK: Tensor, scratch: Scratch, scale_dtype: torch.dtype, format: str, granularity: Granularity
) -> Encoded:
    encoded = encode_integer(block_RK, format=format, granularity=granularity, scale_dtype=scale_dtype)
    decoded = decode(encoded.codes, encoded.scale, granularity=granularity)
    sums = compare(block_RK, decoded, scratch, clipped=encoded.num_clipped, scale=encoded.scale)
    past = int(torch.isinf(block_RK.float()).sum())
    sums.overflowed = max(sums.overflowed, past)
    return Encoded((encoded.codes, encoded.scale), sums, lambda: decoded)
