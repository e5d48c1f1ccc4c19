"""`Conversion`: what becomes of one tensor, block by block. Formats bring an `encode`; `stream` runs it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from brim.checkpoints.reader import element_type
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import RowSums, Statistics, compare, look
from brim.models.directory import StoredTensor
from brim.models.spec import TensorSpec
from brim.numerics.encode import TORCH_DTYPES
from brim.numerics.granularity import Granularity

BLOCK_ELEMENTS = 2**18
"""Encoded at a time, unless a single row is longer: 1 MiB in FP32, thrice that with what encoding takes. Half as many
fit the second cache better, but then two threads wait for Python's lock as long as they work."""
_DECIDED_WORK_BYTES = 56
"""As `work_bytes`: codes read, decoded, quotient and error, and bits to pack."""


class Encoded(NamedTuple):
    """Some rows of a tensor, encoded."""

    parts: tuple[Tensor, ...]
    """The next bytes of each output of the conversion; good until the next block is encoded."""
    statistics: Statistics | RowSums
    decoded: Callable[[], Tensor]
    """The rows, in floats, as a reader will see them; in the order of the output. As good, and as long, as `parts`."""


Encode = Callable[[Tensor, Scratch], Encoded]
"""(Rows of the source, (R, row_elements), a worker's memory) -> what they become. Runs on several threads at once."""


EncodePlaced = Callable[[Tensor, int, Scratch], Encoded]
"""As Encode, told the number of the first row, too."""


class Integers(NamedTuple):
    """How a conversion writes codes and scales, whoever chooses them."""

    format: str
    granularity: Granularity
    scale_dtype: torch.dtype
    finish: Callable[[Tensor], Tensor]
    """int8 codes (R, K) -> the first output's rows; the second output's are the scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What becomes of one tensor. Its rows become the outputs' rows, in order."""

    source: StoredTensor
    outputs: tuple[TensorSpec, ...]
    encode: Encode
    row_elements: int
    """Elements of the source that must be encoded together; all that share a scale, for one. 1: any number."""
    row_bytes: tuple[int, ...]
    """What one row becomes, in each output; or `rows_together` of them."""
    rows_together: int = 1
    """Rows whose outputs share bytes: zero points are packed down the rows. The last may be fewer."""
    work_bytes: int = 16
    """Memory that `encode` takes, for each element, beside the block itself."""
    blocks_at_once: int = 1
    """How many blocks `encode` wants together, if nothing else that reads the tensor wants fewer."""
    constants: tuple[tuple[TensorSpec, bytes], ...] = ()
    """Further outputs, known beforehand: a table, a shape."""
    by_column: bool = False
    """Rows are the source's columns: what transformers keeps transposed (GPT-2's Conv1D)."""
    format: str = ""
    """Of the elements, where the first output's dtype does not say it: several are packed into one of its elements."""
    integers: Integers | None = None
    """Where the outputs are codes and scales, which calibration may choose."""
    by_bounds: Callable[[float, float], "Conversion"] | None = None
    """Where one scale is for the whole tensor: the conversion, told the tensor's least and greatest element."""
    encode_placed: EncodePlaced | None = None
    """In place of `encode`, for rows whose codes were chosen beforehand."""

    @property
    def unit_elements(self) -> int:
        """Elements of the source whose outputs are bytes of their own."""
        return self.row_elements * self.rows_together

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All that is written."""
        return (*self.outputs, *(spec for spec, _ in self.constants))

    def encoded(self, rows: Tensor, first: int, scratch: Scratch) -> Encoded:
        """The source's rows from number `first` on."""
        return self.encode(rows, scratch) if self.encode_placed is None else self.encode_placed(rows, first, scratch)

    def decided(self, encode_placed: EncodePlaced) -> "Conversion":
        work_bytes = max(self.work_bytes, _DECIDED_WORK_BYTES)
        return replace(self, encode_placed=encode_placed, work_bytes=work_bytes, blocks_at_once=1)


def keep(tensor: StoredTensor) -> Conversion:
    """As it is, and looked at."""
    row = _row_elements(tensor)
    return Conversion(
        source=tensor,
        outputs=(tensor.spec,),
        encode=lambda block, scratch: Encoded((block,), look(block, scratch), lambda: block),
        row_elements=row,
        row_bytes=(row * element_type(tensor.spec).itemsize,),
    )


def cast(tensor: StoredTensor, output: TensorSpec) -> Conversion:
    """In another float format."""
    dtype, row = TORCH_DTYPES[output.dtype], _row_elements(tensor)

    def encode(block: Tensor, scratch: Scratch) -> Encoded:
        narrow = scratch.take("cast", block.shape, dtype).copy_(block)
        return Encoded((narrow,), compare(block, narrow, scratch), lambda: narrow)

    return Conversion(
        source=tensor, outputs=(output,), encode=encode, row_elements=row, row_bytes=(row * dtype.itemsize,)
    )


def row_elements(spec: TensorSpec) -> int:
    """Of one row where the tensor has rows of numbers, none too long; else 1."""
    rows = len(spec.shape) > 1 and spec.dtype in TORCH_DTYPES and 0 < spec.shape[-1] <= BLOCK_ELEMENTS
    return spec.shape[-1] if rows else 1


def _row_elements(tensor: StoredTensor) -> int:
    """As `row_elements`, and of every column that the file has in place of a row: it is read whole."""
    return max(1, tensor.spec.shape[-1]) if tensor.transposed else row_elements(tensor.spec)
