"""What a conversion did to each tensor: `quantization_report.json`."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from brim.checkpoints.conversion import row_elements
from brim.checkpoints.statistics import Statistics
from brim.models.spec import TensorSpec
from brim.report import SCHEMA

REPORT_NAME = "quantization_report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """One tensor before and after."""

    name: str
    shape: tuple[int, ...]
    source_format: str
    format: str
    bytes_before: int
    bytes_after: int
    """With its scales."""
    sqnr_db: float | None
    """Signal to quantization noise, 10 log10(sum w^2 / sum e^2); None where nothing was lost."""
    largest_error: float
    """Of |decoded - source|, in the tensor's own units."""
    clipped_share: float
    """Of the elements: past the last code."""
    zeroed_share: float
    """Of the elements: became zero and were not."""
    scale_min: float | None
    scale_max: float | None
    """None for formats without scale."""
    largest: float | None
    """Of |source|; None where its elements are no floats."""
    outlier_ratio: float | None
    """`largest` over the root of the mean square: how much of the grid a single element takes."""
    zero_rows: int | None
    """Rows of a matrix that are all zero; None for what has no rows, or too long ones."""
    subnormal_share: float
    """Of the elements: smaller than the least normal number of the source's format, and not zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """A conversion, tensor by tensor."""

    model: str
    to: str
    layout: str
    tensors: tuple[TensorReport, ...]

    @property
    def bytes_before(self) -> int:
        return sum(tensor.bytes_before for tensor in self.tensors)

    @property
    def bytes_after(self) -> int:
        return sum(tensor.bytes_after for tensor in self.tensors)

    @property
    def converted(self) -> tuple[TensorReport, ...]:
        """Tensors that changed their format."""
        return tuple(tensor for tensor in self.tensors if tensor.format != tensor.source_format)

    def to_dict(self) -> dict[str, Any]:
        converted = self.converted
        totals = {
            "tensors": len(self.tensors),
            "converted": len(converted),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "converted_bytes_before": sum(tensor.bytes_before for tensor in converted),
            "converted_bytes_after": sum(tensor.bytes_after for tensor in converted),
            "worst_sqnr_db": min((t.sqnr_db for t in converted if t.sqnr_db is not None), default=None),
        }
        return {
            "schema": SCHEMA,
            "model": self.model,
            "to": self.to,
            "layout": self.layout,
            "totals": totals,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


def tensor_report(
    source: TensorSpec, outputs: Sequence[TensorSpec], sums: Statistics, *, format: str = ""
) -> TensorReport:
    """The report of a tensor from the sums over all of it; `format` of its elements, "": its first output's dtype."""
    rms = math.sqrt(sums.signal / sums.elements) if sums.elements else 0.0
    looked_at = sums.largest >= 0
    return TensorReport(
        name=source.name,
        shape=source.shape,
        source_format=source.dtype,
        format=format or outputs[0].dtype,
        bytes_before=source.nbytes,
        bytes_after=sum(output.nbytes for output in outputs),
        sqnr_db=10 * math.log10(sums.signal / sums.noise) if sums.noise and sums.signal else None,
        largest_error=sums.largest_error,
        clipped_share=_share(sums.clipped, sums.elements),
        zeroed_share=_share(sums.zeroed, sums.elements),
        scale_min=sums.scale_min if sums.scale_min <= sums.scale_max else None,
        scale_max=sums.scale_max if sums.scale_min <= sums.scale_max else None,
        largest=sums.largest if looked_at else None,
        outlier_ratio=sums.largest / rms if looked_at and rms else None,
        zero_rows=sums.zero_rows if looked_at and row_elements(source) > 1 else None,
        subnormal_share=_share(sums.subnormal, sums.elements),
    )


def _share(count: int, elements: int) -> float:
    return count / elements if elements else 0.0
