"""What a conversion did to each tensor: `quantization_report.json`."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

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


class TensorAudit:
    """Adds up what happens to one tensor, tile by tile."""

    def __init__(self) -> None:
        self.elements = 0
        self.clipped = 0
        self.zeroed = 0
        self.signal = 0.0
        self.noise = 0.0
        self.largest_error = 0.0
        self.scale_min = math.inf
        self.scale_max = -math.inf

    def add(self, source: Tensor, decoded: Tensor, *, clipped: int = 0, scale: Tensor | None = None) -> None:
        """A tile as it was and as its reader will see it; both may be overwritten."""
        dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
        source, decoded = source.to(dtype), decoded.to(dtype)
        self.elements += source.numel()
        self.clipped += clipped
        self.zeroed += int(torch.count_nonzero(source)) - int(torch.count_nonzero(decoded))
        error = decoded.sub_(source)
        self.largest_error = max(self.largest_error, float(torch.linalg.vector_norm(error, ord=math.inf)))
        self.signal += _sum_of_squares(source)
        self.noise += _sum_of_squares(error)
        if scale is not None:
            self.scale_min = min(self.scale_min, float(scale.min()))
            self.scale_max = max(self.scale_max, float(scale.max()))

    def report(self, source: TensorSpec, outputs: Sequence[TensorSpec]) -> TensorReport:
        lossless = self.noise == 0
        scaled = self.scale_min <= self.scale_max
        return TensorReport(
            name=source.name,
            shape=source.shape,
            source_format=source.dtype,
            format=outputs[0].dtype,
            bytes_before=source.nbytes,
            bytes_after=sum(output.nbytes for output in outputs),
            sqnr_db=None if lossless else 10 * math.log10(self.signal / self.noise),
            largest_error=self.largest_error,
            clipped_share=self.clipped / self.elements if self.elements else 0.0,
            zeroed_share=self.zeroed / self.elements if self.elements else 0.0,
            scale_min=self.scale_min if scaled else None,
            scale_max=self.scale_max if scaled else None,
        )


def _sum_of_squares(values: Tensor) -> float:
    """fp32 within a tile is exact to about 1e-6, far below what a dB shows; fp64 where squares leave fp32's range."""
    total = float(torch.dot(values, values))
    return total if 1e-24 < total < math.inf else float(values.double().square().sum())
