"""How fast one device runs operators of a training step: by kind, format and size, as measured. No torch.

A roofline with one peak and one bandwidth is a lower bound: thin products do not reach the peak, a new tensor's memory
is touched for the first time (the system has to find and clear its pages), and every operator costs its dispatch. Each
of these is a rate that was timed on the device (`calibrate.py`), none a constant.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["fp32", "bf16"]
FORMATS: tuple[Format, ...] = ("fp32", "bf16")

Product = Literal["square", "turned", "wide", "few", "thin", "narrow"]
"""Shape of a matrix product: all sides middling; the same with its left side transposed in memory, as for the gradient
of a weight; a vocabulary's side; few rows; a short inner side (adapters' second
matrix); a short other side (their first)."""
PRODUCTS: tuple[Product, ...] = ("square", "turned", "wide", "few", "thin", "narrow")
SHORT_SIDE, FEW_ROWS, WIDE_SIDE = 64, 128, 16384

Pass = Literal["fresh", "in-place", "function", "reduce"]
"""Bytes that an operator moves: written to memory that is touched for the first time; read, or written where something
was; through a function that is no single instruction (exp, tanh); read for a sum."""
PASSES: tuple[Pass, ...] = ("fresh", "in-place", "function", "reduce")
SIZES = (2**18, 2**22, 2**26)
"""Bytes of the largest tensor at which passes are timed: in a core's cache, in the shared one, in memory."""

Attention = Literal["attention", "attention-backward"]
ATTENTIONS: tuple[Attention, ...] = ("attention", "attention-backward")
LENGTHS = (128, 256, 1024)
"""Tokens at which attention is timed: short rows do not fill its tiles, long ones skip what a causal mask hides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRates:
    """FLOP/s of products and attention, bytes/s of passes, seconds of a dispatch; by `key`."""

    rates: Mapping[str, float]
    overhead_s: float
    """Of any operator, before it does anything."""

    def product_s(self, flops: float, *, shape: Product, number_format: Format) -> float:
        return flops / self.rates[key(shape, number_format)]

    def attention_s(self, flops: float, *, tokens: int, direction: Attention, number_format: Format) -> float:
        """Seconds of attention over so many tokens a row; `flops` counts all scores, hidden ones too."""
        return flops / self._rate(direction, number_format, LENGTHS, tokens)

    def pass_s(self, nbytes: float, *, largest: int, kind: Pass, number_format: Format) -> float:
        """Seconds to move `nbytes` in all, where the largest tensor has `largest`."""
        return nbytes / self._rate(kind, number_format, SIZES, largest)

    def _rate(self, kind: str, number_format: Format, sizes: tuple[int, ...], size: int) -> float:
        """Between the sizes that were timed, on a logarithmic scale; beyond them as at the last."""
        at = [self.rates[key(kind, number_format, known)] for known in sizes]
        size = min(max(size, sizes[0]), sizes[-1])
        upper = next(index for index in range(1, len(sizes)) if size <= sizes[index])
        low, high = sizes[upper - 1], sizes[upper]
        part = math.log(size / low) / math.log(high / low)
        return float(at[upper - 1] ** (1 - part) * at[upper] ** part)

    def to_dict(self) -> dict[str, Any]:
        return {"rates": dict(self.rates), "overhead_s": self.overhead_s}

    @classmethod
    def from_dict(cls, values: Any) -> "OperatorRates | None":
        """None where a rate is missing or no positive number: a file of another version, or a damaged one."""
        rates = values.get("rates") if isinstance(values, dict) else None
        if not isinstance(rates, dict) or not all(map(_is_rate, [values.get("overhead_s"), *map(rates.get, KEYS)])):
            return None
        return cls(rates={name: float(rates[name]) for name in KEYS}, overhead_s=float(values["overhead_s"]))


def key(kind: str, number_format: Format, size: int | None = None) -> str:
    """`square fp32`, `fresh bf16 4194304`."""
    return f"{kind} {number_format}" if size is None else f"{kind} {number_format} {size}"


KEYS = (
    *(key(kind, number_format) for kind in PRODUCTS for number_format in FORMATS),
    *(key(kind, number_format, size) for kind in ATTENTIONS for number_format in FORMATS for size in LENGTHS),
    *(key(kind, number_format, size) for kind in PASSES for number_format in FORMATS for size in SIZES),
)


def product_shape(rows: int, inner: int, columns: int, *, turned: bool = False) -> Product:
    """The class of a (rows x inner) (inner x columns) product; `turned`: its left side lies transposed."""
    if inner < SHORT_SIDE:
        return "thin"
    if min(rows, columns) < SHORT_SIDE:
        return "narrow"
    if max(rows, inner, columns) > WIDE_SIDE:
        return "wide"
    if turned:
        return "turned"
    return "few" if rows <= FEW_ROWS else "square"


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
