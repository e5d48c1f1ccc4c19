"""Integers with a scale per row or group of a row, in few passes over a block that stays in the processor's cache.

The codes and scales are those of `numerics.encode.encode_integer`, bit by bit. How this differs: it writes into memory
that is there already, clips only where a scale leaves something to clip, and has the sums for the report from values
that it needs anyway. Shapes: R rows, K elements of a row, S scales, B elements that share one.
"""

from collections.abc import Sequence

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
_PIECE_ELEMENTS = 2**16
"""Of a block: with quotient and rounded quotient 768 KiB, which the second cache of a server's core holds."""
BLOCKS_AT_ONCE = 4
"""A piece is little work for as many calls; what is done once a block is shared by more of them."""
WORK_BYTES = 8
"""For each element, beside what a few pieces take: its code, packed, and for 16-bit sources a wider copy of a piece."""


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
    size = granularity.size if isinstance(granularity, PerGroup) else inputs
    pieces = block_RK.view(-1, size).split(max(1, _PIECE_ELEMENTS // size))
    top_S, nonzero, subnormal = _survey(pieces, scratch)
    stored_S = storable_scale(top_S / largest, largest_code=largest, dtype=scale_dtype)
    scale_S = stored_S.float()
    # The largest element of a row has the largest code. A scale in FP32 is too near absmax/127 to leave one past 127.
    clips = scale_dtype != torch.float32 and bool(((top_S / scale_S).round_() > largest).any())
    codes_SB = scratch.take("codes", (len(top_S), size), torch.int8)
    signal_S, noise_S, clipped = torch.empty_like(scale_S), torch.empty_like(scale_S), 0
    for source_PB, scale_P1, codes_PB, signal_P, noise_P in zip(
        pieces, *(rows.split(len(pieces[0])) for rows in (scale_S[:, None], codes_SB, signal_S, noise_S)), strict=True
    ):
        scaled_PB = scratch.take("scaled", source_PB.shape, torch.float32)
        rounded_PB = scratch.take("rounded", source_PB.shape, torch.float32)
        torch.div(widened(source_PB, scratch), scale_P1, out=scaled_PB)
        torch.round(scaled_PB, out=rounded_PB)
        clipped += _clip(rounded_PB, largest) if clips else 0
        codes_PB.copy_(rounded_PB)
        torch.linalg.vector_norm(scaled_PB, dim=-1, out=signal_P)
        torch.linalg.vector_norm(rounded_PB.sub_(scaled_PB), dim=-1, out=noise_P)
    found = RowSums(
        elements=block_RK.numel(),
        subnormal=subnormal,
        clipped=clipped,
        zeroed=nonzero - int(np.count_nonzero(codes_SB.numpy())),
        top_R=top_S,
        scale_R=scale_S,
        signal_R=signal_S,
        noise_R=noise_S,
        largest_error=_largest_error(pieces, codes_SB, scale_S, scratch, bound=None if clips else 0.5),
        scales_per_row=inputs // size,
    )

    def decoded() -> Tensor:
        return (codes_SB * scale_S.unsqueeze(-1)).view(block_RK.shape)

    return Encoded((codes_SB.view(block_RK.shape), stored_S), found, decoded)


def _survey(pieces: Sequence[Tensor], scratch: Scratch) -> tuple[Tensor, int, int]:
    """The largest of each row's |elements| in FP32; how many elements are not zero; how many of them are subnormal."""
    top_S = torch.empty(sum(len(piece) for piece in pieces), dtype=pieces[0].dtype)
    smallest_normal = torch.finfo(pieces[0].dtype).tiny
    nonzero = subnormal = 0
    for piece_PB, top_P in zip(pieces, top_S.split(len(pieces[0])), strict=True):
        size_PB = torch.abs(piece_PB, out=scratch.take("size", piece_PB.shape, piece_PB.dtype))
        torch.amax(size_PB, dim=-1, out=top_P)
        # Most pieces have neither zeros nor subnormal numbers, and need no count.
        if float(torch.amin(size_PB)) >= smallest_normal:
            nonzero += piece_PB.numel()
        else:
            counted = count_nonzero(piece_PB, scratch)
            nonzero, subnormal = nonzero + counted[0], subnormal + counted[1]
    return top_S.float(), nonzero, subnormal


def _largest_error(
    pieces: Sequence[Tensor], codes_SB: Tensor, scale_S: Tensor, scratch: Scratch, *, bound: float | None
) -> float:
    """Of |decoded - source|. No error is past `bound` steps (None: any may be), so few rows need a look: those whose
    step is so large that theirs might be the largest."""
    rows, found = len(pieces[0]), 0.0
    if bound is not None:
        piece, row = divmod(int(scale_S.argmax()), rows)
        only, place = slice(row, row + 1), slice(piece * rows + row, piece * rows + row + 1)
        found = _error(pieces[piece][only], codes_SB[place], scale_S[place], scratch)
    for source_PB, codes_PB, scale_P in zip(pieces, codes_SB.split(rows), scale_S.split(rows), strict=True):
        if bound is None or float(scale_P.max()) * bound > found:
            found = max(found, _error(source_PB, codes_PB, scale_P, scratch))
    return found


def _error(source_PB: Tensor, codes_PB: Tensor, scale_P: Tensor, scratch: Scratch) -> float:
    """The largest of |decoded - source|."""
    steps_PB = scratch.take("scaled", source_PB.shape, torch.float32)
    torch.div(widened(source_PB, scratch), scale_P.unsqueeze(-1), out=steps_PB).sub_(codes_PB)
    return float((largest_of_rows(steps_PB).double() * scale_P.double()).max())


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
