"""What one number becomes in a format, in exact arithmetic. The scalar oracle of the tensor encoders. No torch."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from brim.numerics.formats import FORMATS, NumberFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Representation:
    """A number as a format holds it."""

    value: float
    """Nearest value the format has; Inf where the number is past the largest and the format has Inf."""
    error: float
    """`value` minus the number."""
    scale: float | None = None
    """The factor between code and value; None for formats without one."""
    code: float | None = None
    """What the scale multiplies; None for formats without scale."""

    def to_dict(self) -> dict[str, Any]:
        """JSON has no Inf: a value that overflowed is null."""
        facts = {"value": self.value, "error": self.error, "scale": self.scale, "code": self.code}
        return {key: fact if fact is None or math.isfinite(fact) else None for key, fact in facts.items()}


def represent(row: NumberFormat, number: float, *, scale: float | None = None) -> Representation:
    """The finite `number` in this format: the nearest value, of two equally near ones the even code.

    Where the format takes a scale: `scale`, or when None the one fitted to this number alone, as stored. Numbers past
    the largest value become the largest where the format has no Inf, as in torch (FP8 E4M3) and OCP MX. A scale is no
    larger than its format's largest; ggml would store Inf there.
    """
    if row.scale == "none":
        value = round_to_float(row, number)
        return Representation(value=value, error=_difference(value, number))
    factor = fitted_scale(row, number) if scale is None else scale
    code = _nearest_code(row, Fraction(number) / Fraction(factor))
    value = float(Fraction(code) * Fraction(factor))
    return Representation(value=value, error=_difference(value, number), scale=factor, code=code)


def fitted_scale(row: NumberFormat, number: float) -> float:
    """The scale of a block that holds this number alone; 1 for zero, and where it would be stored as 0."""
    if not number:
        return 1.0
    if row.scale == "power-of-two":
        # OCP MX 1.0, section 6.3: the exponent of the largest element less the largest exponent of the element format.
        exponent = _exponent(Fraction(number)) - row.max_exponent
        return 2.0 ** max(-127, min(127, exponent))
    # A lone code -8 (q4_0, as ggml's quantize_row_q4_0_ref): the element of largest size, with its sign, maps to it.
    lone = row.kind == "integer" and -row.codes[0] > row.codes[1]
    wanted = Fraction(number) / row.codes[0] if lone else abs(Fraction(number)) / Fraction(row.largest)
    stored = round_to_float(FORMATS[row.scale_format], wanted)
    largest = FORMATS[row.scale_format].largest
    return max(-largest, min(largest, stored)) or 1.0


def round_to_float(row: NumberFormat, number: float | Fraction) -> float:
    """The nearest value of a float format, ties to the even fraction; subnormals kept."""
    if not number:
        return float(number)
    exact = Fraction(number)
    sign = -1 if exact < 0 else 1  # a fraction may be past what a float holds
    exponent = max(_exponent(exact), row.min_exponent)
    quantum = Fraction(2) ** (exponent - row.fraction_bits)
    rounded = round(exact / quantum) * quantum
    if abs(rounded) > Fraction(row.largest):
        return math.copysign(math.inf if row.top_exponent == "inf-nan" else row.largest, sign)
    return math.copysign(float(abs(rounded)), sign)


def _nearest_code(row: NumberFormat, scaled: Fraction) -> float:
    if row.kind == "float":
        return round_to_float(row, scaled)
    if row.kind == "integer":
        low, high = row.codes
        return float(max(low, min(high, round(scaled))))
    return min(row.grid, key=lambda value: abs(Fraction(value) - scaled))


def _exponent(number: Fraction) -> int:
    """e such that 2^e <= |number| < 2^(e + 1)."""
    size = abs(number)
    guess = size.numerator.bit_length() - size.denominator.bit_length()
    return guess if size >= Fraction(2) ** guess else guess - 1


def _difference(value: float, number: float) -> float:
    return float(Fraction(value) - Fraction(number)) if math.isfinite(value) else value
