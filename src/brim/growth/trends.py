"""What grew and what did not: parameters, tokens and compute of released models, over all years and since one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from brim.growth.fit import Growth, fit_growth
from brim.growth.history import Release, releases

TURN = 2022
"""From here on the whole does not speak for the recent: sizes stopped growing with compute (Chinchilla, March 2022)."""

QUANTITIES = {
    "num_parameters": "parameters",
    "active_parameters": "active parameters",
    "tokens": "training tokens",
    "flops": "training compute",
}
"""Field of `Release` -> what people call it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """One quantity's growth; None where too few models say it."""

    quantity: str
    title: str
    points: tuple[tuple[float, float], ...]
    """(date, value)."""
    overall: Growth | None
    before: Growth | None
    since: Growth | None

    @property
    def verdict(self) -> str:
        """What the interval since the year allows to say."""
        if self.since is None:
            return "too few models since to say"
        if self.since.is_growth:
            return "growing"
        return "shrinking" if self.since.factor_high < 1 else "no growth that can be told from none"

    def to_dict(self) -> dict[str, Any]:
        fits = {"overall": self.overall, "before": self.before, "since": self.since}
        return {
            "quantity": self.quantity,
            **{name: None if fit is None else fit.to_dict() for name, fit in fits.items()},
            "verdict_since": self.verdict,
        }


def trends(since: int = TURN, models: Sequence[Release] | None = None) -> list[Trend]:
    """A trend of each quantity; `models` other than the shipped ones may be given."""
    return [_trend(quantity, since, releases() if models is None else models) for quantity in QUANTITIES]


def _trend(quantity: str, since: int, models: Sequence[Release]) -> Trend:
    points = tuple((model.date, value) for model in models if (value := getattr(model, quantity)))
    return Trend(
        quantity=quantity,
        title=QUANTITIES[quantity],
        points=points,
        overall=fit_growth(points),
        before=fit_growth(point for point in points if point[0] < since),
        since=fit_growth(point for point in points if point[0] >= since),
    )
