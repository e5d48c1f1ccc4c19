"""What happens to the elements of a block, in sums that add up: over a tensor, and over runs that go on.

Shapes: R rows, K elements of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from brim.checkpoints.scratch import Scratch

_EXPONENTS = {
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""Format -> integers of its width, and the bits of its exponent: all of them are 0 in zero and in subnormal numbers."""


@dataclass(slots=True)
class Statistics:
    """Sums over some elements of a tensor."""

    elements: int = 0
    largest: float = -1.0
    """Of |source|; -1 where that was not asked."""
    zero_rows: int = 0
    subnormal: int = 0
    signal: float = 0.0
    noise: float = 0.0
    """Sums of the squares of source and error."""
    largest_error: float = 0.0
    overflowed: int = 0
    """Became Inf."""
    clipped: int = 0
    zeroed: int = 0
    scale_min: float = math.inf
    scale_max: float = -math.inf

    def add(self, other: "Statistics") -> None:
        self.elements += other.elements
        self.largest = max(self.largest, other.largest)
        self.zero_rows += other.zero_rows
        self.subnormal += other.subnormal
        self.signal += other.signal
        self.noise += other.noise
        self.largest_error = max(self.largest_error, other.largest_error)
        self.overflowed += other.overflowed
        self.clipped += other.clipped
        self.zeroed += other.zeroed
        self.scale_min = min(self.scale_min, other.scale_min)
        self.scale_max = max(self.scale_max, other.scale_max)

    def to_list(self) -> list[float]:
        """For JSON, exactly; Inf as Python writes it."""
        return list(astuple(self))


class RowSums(NamedTuple):
    """Of some rows that have a scale each (or several: then of each part that has one); not added up yet, since for few
    rows that takes as long as encoding them."""

    elements: int
    subnormal: int
    clipped: int
    zeroed: int
    top_R: Tensor
    """The largest of |source|."""
    scale_R: Tensor
    signal_R: Tensor
    noise_R: Tensor
    """Roots of the sums of squares of source and error, in steps of the code: no square leaves FP32's range."""
    largest_error: float
    """In the source's units."""
    scales_per_row: int = 1


def add_up(blocks: Sequence[RowSums]) -> Statistics:
    """Of all these rows."""
    top, scale, signal, noise = (
        torch.cat(rows).double()
        for rows in zip(*((b.top_R, b.scale_R, b.signal_R, b.noise_R) for b in blocks), strict=True)
    )
    return Statistics(
        elements=sum(block.elements for block in blocks),
        largest=float(top.max()),
        zero_rows=sum(_count_zero_rows(block) for block in blocks),
        subnormal=sum(block.subnormal for block in blocks),
        signal=float((signal * scale).square().sum()),
        noise=float((noise * scale).square().sum()),
        largest_error=max(block.largest_error for block in blocks),
        clipped=sum(block.clipped for block in blocks),
        zeroed=sum(block.zeroed for block in blocks),
        scale_min=float(scale.min()),
        scale_max=float(scale.max()),
    )


def _count_zero_rows(block: RowSums) -> int:
    return int((block.top_R.view(-1, block.scales_per_row) == 0).all(dim=-1).sum())


def look(source_RK: Tensor, scratch: Scratch) -> Statistics:
    """Of elements that stay as they are."""
    found = Statistics(elements=source_RK.numel())
    if source_RK.dtype not in _EXPONENTS or not source_RK.numel():
        return found
    _, found.subnormal = count_nonzero(source_RK, scratch)
    wide = widened(source_RK, scratch)
    top_R = largest_of_rows(wide)
    found.largest = float(top_R.max())
    found.zero_rows = top_R.numel() - int(torch.count_nonzero(top_R))
    found.signal = sum_of_squares(wide)
    return found


def compare(
    source_RK: Tensor, decoded_RK: Tensor, scratch: Scratch, *, clipped: int = 0, scale: Tensor | None = None
) -> Statistics:
    """Of elements that a reader will see as `decoded_RK`; of any formats, and slower than what knows its format."""
    found = look(source_RK, scratch)
    wide = widened(source_RK, scratch)
    error = scratch.take("error", source_RK.shape, wide.dtype)
    error.copy_(decoded_RK)
    nonzero, _ = count_nonzero(source_RK, scratch)
    found.zeroed = nonzero - int(torch.count_nonzero(error))
    found.clipped = clipped
    error.sub_(wide)
    found.largest_error = float(largest_of_rows(error).max()) if error.numel() else 0.0
    if math.isinf(found.largest_error):
        found.overflowed = int(torch.isinf(error).sum())
    found.noise = sum_of_squares(error)
    if scale is not None:
        found.scale_min, found.scale_max = (float(bound) for bound in torch.aminmax(scale.float()))
    return found


def widened(source: Tensor, scratch: Scratch) -> Tensor:
    """As FP32, or FP64 as it is."""
    if source.dtype in (torch.float32, torch.float64):
        return source
    return scratch.take("wide", source.shape, torch.float32).copy_(source)


def largest_of_rows(values_RK: Tensor) -> Tensor:
    """Of |values|, (R,); NaN where there is one. Two passes: torch's norm with `inf` takes ten times as long."""
    return torch.maximum(torch.amax(values_RK, dim=-1), torch.amin(values_RK, dim=-1).neg_())


def count_nonzero(source: Tensor, scratch: Scratch) -> tuple[int, int]:
    """Elements that are not zero, and those of them that are subnormal. By bits: many times faster than by value."""
    integer, exponent = _EXPONENTS[source.dtype]
    bits = source.view(integer)
    work = scratch.take("bits", source.shape, integer)
    # torch masks twice as fast as numpy, and numpy counts many times as fast as torch.
    normal = int(np.count_nonzero(torch.bitwise_and(bits, exponent, out=work).numpy()))
    if normal == bits.numel():
        return normal, 0
    nonzero = int(np.count_nonzero(torch.bitwise_left_shift(bits, 1, out=work).numpy()))  # without the sign: -0 is zero
    return nonzero, nonzero - normal


def sum_of_squares(values: Tensor) -> float:
    """fp32 within a row is exact to about 1e-6, far below what a dB shows; fp64 where squares leave fp32's range."""
    total = float(torch.linalg.vector_norm(values, dim=-1).double().square_().sum())
    return total if 1e-24 < total < math.inf else float(values.double().square().sum())
