"""One row per number format; every size, limit and step is derived from its row. No torch.

A row says how one element is stored and, for formats that prescribe scales, how many elements share one. What a tensor
takes is answered from the row alone (`nbytes`); what a number becomes is in `represent`; tensors are in `encode`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from brim.errors import UnknownNameError, did_you_mean
from brim.models.safetensors_header import DTYPES

SAFETENSORS_CODES: Mapping[str, str] = {name: code for code, (name, _) in DTYPES.items()}
"""Format's name -> dtype code of a safetensors file."""

# Quantiles of a normal distribution, scaled to hold -1, 0 and 1: QLoRA, arXiv:2305.14314, appendix E.
NF4_GRID = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormat:
    """How a number is stored: bits of an element, what its codes mean, the scale that a block shares."""

    name: str
    kind: Literal["float", "integer", "grid"]
    element_bits: int
    exponent_bits: int = 0
    fraction_bits: int = 0
    top_exponent: Literal["inf-nan", "nan", "finite"] = "inf-nan"
    """What the all-ones exponent stands for: Inf and NaN as IEEE 754 has it; numbers but for one NaN; numbers only."""
    codes: tuple[int, int] = (0, 0)
    """Least and greatest code used, of an integer format."""
    grid: tuple[float, ...] = ()
    """The values of the codes, ascending, of a grid format."""
    scale: Literal["none", "absmax", "power-of-two"] = "none"
    """How a scale is fitted: the largest element maps to the last code; or the power of two below that (OCP MX)."""
    scale_format: str = ""
    """How the scale is stored."""
    block: int = 0
    """Elements that share one scale; 0 where granularity is a free choice, and its scales are not counted here."""
    scale_bits: int = 0
    """Of the scale of one block."""

    @property
    def safetensors_code(self) -> str | None:
        """The dtype of a safetensors file that holds such elements; None where there is none."""
        return SAFETENSORS_CODES.get(self.name)

    @property
    def bias(self) -> int:
        """Of the exponent."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def max_exponent(self) -> int:
        top = 2**self.exponent_bits - 1 - self.bias
        return top - 1 if self.top_exponent == "inf-nan" else top

    @property
    def min_exponent(self) -> int:
        """Of normal numbers, and of the step between subnormal ones."""
        return 1 - self.bias

    @property
    def largest(self) -> float:
        """Greatest finite value, before any scale."""
        if self.kind == "float":
            # One NaN takes the last fraction of the top exponent.
            lost = 2 if self.top_exponent == "nan" else 1
            return (2 - lost * 2.0**-self.fraction_bits) * 2.0**self.max_exponent
        return float(self.codes[1]) if self.kind == "integer" else self.grid[-1]

    @property
    def smallest_normal(self) -> float | None:
        """Least positive value at full precision; None for formats without exponent."""
        return 2.0**self.min_exponent if self.kind == "float" else None

    @property
    def smallest(self) -> float:
        """Least positive value, before any scale."""
        if self.kind == "float":
            return 2.0 ** (self.min_exponent - self.fraction_bits)
        return 1.0 if self.kind == "integer" else min(value for value in self.grid if value > 0)

    @property
    def step(self) -> float:
        """Distance from 1 to the next larger value (machine epsilon); for other kinds, the least between neighbours."""
        if self.kind == "float":
            return 2.0**-self.fraction_bits
        return 1.0 if self.kind == "integer" else min(b - a for a, b in zip(self.grid, self.grid[1:], strict=False))

    def nbytes(self, numel: int) -> int:
        """Bytes of `numel` elements, with the scales of their blocks."""
        num_scales = _ceil_div(numel, self.block) if self.block else 0
        return _ceil_div(numel * self.element_bits, 8) + _ceil_div(num_scales * self.scale_bits, 8)


FORMATS: Mapping[str, NumberFormat] = {
    row.name: row
    for row in (
        NumberFormat(name="fp32", kind="float", element_bits=32, exponent_bits=8, fraction_bits=23),
        NumberFormat(name="fp16", kind="float", element_bits=16, exponent_bits=5, fraction_bits=10),
        NumberFormat(name="bf16", kind="float", element_bits=16, exponent_bits=8, fraction_bits=7),
        NumberFormat(
            name="fp8_e4m3", kind="float", element_bits=8, exponent_bits=4, fraction_bits=3, top_exponent="nan"
        ),
        NumberFormat(name="fp8_e5m2", kind="float", element_bits=8, exponent_bits=5, fraction_bits=2),
        NumberFormat(
            name="int8", kind="integer", element_bits=8, codes=(-127, 127), scale="absmax", scale_format="fp32"
        ),
        # GGUF blocks: ggml-common.h, block_q8_0 and block_q4_0.
        NumberFormat(
            name="q8_0", kind="integer", element_bits=8, codes=(-127, 127),
            scale="absmax", scale_format="fp16", block=32, scale_bits=16,
        ),
        NumberFormat(
            name="int4", kind="integer", element_bits=4, codes=(-7, 7), scale="absmax", scale_format="fp32"
        ),
        NumberFormat(
            name="q4_0", kind="integer", element_bits=4, codes=(-8, 7),
            scale="absmax", scale_format="fp16", block=32, scale_bits=16,
        ),
        NumberFormat(
            name="nf4", kind="grid", element_bits=4, grid=NF4_GRID,
            scale="absmax", scale_format="fp32", block=64, scale_bits=32,
        ),
        # OCP Microscaling Formats (MX) 1.0: FP4 E2M1 elements, E8M0 scales.
        NumberFormat(
            name="mxfp4", kind="float", element_bits=4, exponent_bits=2, fraction_bits=1, top_exponent="finite",
            scale="power-of-two", scale_format="fp8_e8m0", block=32, scale_bits=8,
        ),
    )
}  # fmt: skip


def number_format(name: str) -> NumberFormat:
    """The row of this name. Raises UnknownNameError."""
    if name not in FORMATS:
        raise UnknownNameError(
            f"unknown number format {name!r}{did_you_mean(name, FORMATS)}; formats: {', '.join(FORMATS)}"
        )
    return FORMATS[name]


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
