"""Exponential growth fitted to dated values: a straight line through their logarithms, with its interval.

Least squares; the interval is Student's t at 90 %, as Epoch AI states its own, and says how well *these* models lie on
a line. It does not know of models that were not published, nor that members of one family are alike.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist, fmean

CONFIDENCE = 0.9
_FEWEST = 5
"""Points under which a line's interval says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """A fitted line: value at `middle_date` and the factor by which a year multiplies it."""

    num_points: int
    factor: float
    """A year's."""
    factor_low: float
    factor_high: float
    r_squared: float
    middle_date: float
    middle_value: float

    @property
    def doubling_months(self) -> float | None:
        """None where values do not grow."""
        return _doubling_months(self.factor)

    @property
    def doubling_interval(self) -> tuple[float | None, float | None]:
        """Fastest and slowest, in months; None: not growing at that end of the interval."""
        return _doubling_months(self.factor_high), _doubling_months(self.factor_low)

    @property
    def is_growth(self) -> bool:
        """The whole interval lies above no growth."""
        return self.factor_low > 1

    def at(self, date: float) -> float:
        return self.middle_value * self.factor ** (date - self.middle_date)

    def to_dict(self) -> dict[str, float | int | None]:
        fastest, slowest = self.doubling_interval
        return {
            "num_models": self.num_points,
            "factor_per_year": self.factor,
            "factor_low": self.factor_low,
            "factor_high": self.factor_high,
            "doubling_months": self.doubling_months,
            "doubling_months_fastest": fastest,
            "doubling_months_slowest": slowest,
            "r_squared": self.r_squared,
        }


def fit_growth(points: Iterable[tuple[float, float]]) -> Growth | None:
    """The line through (date in years, value); None for fewer than five points or all of one date."""
    pairs = [(date, math.log(value)) for date, value in points]
    if len(pairs) < _FEWEST:
        return None
    dates, logs = zip(*pairs, strict=True)
    count, middle, level = len(dates), fmean(dates), fmean(logs)
    spread = sum((date - middle) ** 2 for date in dates)
    if spread == 0:
        return None
    slope = sum((date - middle) * (log - level) for date, log in zip(dates, logs, strict=True)) / spread
    residual = sum((log - level - slope * (date - middle)) ** 2 for date, log in zip(dates, logs, strict=True))
    total = sum((log - level) ** 2 for log in logs)
    margin = student_t(CONFIDENCE, count - 2) * math.sqrt(residual / (count - 2) / spread)
    return Growth(
        num_points=count,
        factor=math.exp(slope),
        factor_low=math.exp(slope - margin),
        factor_high=math.exp(slope + margin),
        r_squared=1 - residual / total if total else 1.0,
        middle_date=middle,
        middle_value=math.exp(level),
    )


def student_t(confidence: float, degrees: int) -> float:
    """Half-width, in standard errors, of a two-sided interval: Abramowitz and Stegun, 26.7.5.

    Within 0.2 % of the tables from 8 degrees of freedom on, 3 % at 3.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))


def _doubling_months(factor: float) -> float | None:
    return 12 * math.log(2) / math.log(factor) if factor > 1 else None
