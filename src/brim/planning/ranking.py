"""The order of recipes for a goal. Deterministic: equal keys keep the order in which recipes were considered."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from brim.planning.offers import Offer
from brim.planning.sweep import Batch, with_batch
from brim.recipe import Recipe

Goal = Literal["fastest", "lightest", "cheapest"]

_NEARLY = 0.95
"""Recipes within 5 % of a group's best count as equally good: the roofline cannot tell them apart."""
_USUAL_ERROR = 0.01
"""Of the closed form; `closed_form.ERROR_BAND` is what it may be."""
_OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "lion")
"""Whole states, then rounded ones, then other ways of learning."""
_PACKED = {"int8": 1, "nf4": 1, "int4": 2}
"""NF4's codes lie where weights do, INT4's evenly."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """Recipes that differ in rows alone, on one offer."""

    recipe: Recipe
    """With rows of any number."""
    offer: Offer
    band: tuple[float, float]
    """Relative error, low and high, of the closed form's peak on this device."""
    published: tuple[float, float]
    """The same of a rehearsal's peak."""

    @cached_property
    def group(self) -> tuple[Any, ...]:
        """What makes two finalists worth showing side by side: another device, method or precision."""
        return self.offer.name, self.recipe.method, self.recipe.precision

    @cached_property
    def quality(self) -> tuple[bool | int, ...]:
        """Less is better: what is learned, among recipes that are nearly as good otherwise.

        First what keeps FP32 copies of the trained weights (pure BF16 loses small updates), adapters before full
        fine-tuning among those that do not, a base as it is before a packed one, clipped gradients, and optimizers by
        how near they are to AdamW.
        """
        recipe = self.recipe
        loses = loses_updates(recipe)
        name = recipe.optimizer.name
        return (
            loses,
            loses and recipe.method == "full",
            _PACKED.get(recipe.precision.weights, 0),
            recipe.optimizer.in_backward,
            _OPTIMIZERS.index(name) if name in _OPTIMIZERS else 0,
        )


class Candidate(NamedTuple):
    """A recipe, and what ranks it."""

    place: int
    """In the order in which they were considered."""
    kind: Kind
    batch: Batch
    peak_bytes: int
    tokens_per_s: float

    @property
    def recipe(self) -> Recipe:
        return with_batch(self.kind.recipe, self.batch)

    @property
    def lower_bytes(self) -> int:
        """The least that the peak may turn out to be."""
        return int(self.peak_bytes * (1 + self.kind.band[0]))

    @property
    def fits(self) -> bool:
        return self.peak_bytes * (1 + self.kind.band[1]) <= self.kind.offer.budget_bytes

    @property
    def probably_fits(self) -> bool:
        """Whether a rehearsal that finds what the closed form says is within the budget with its upper bound."""
        return self.peak_bytes * (1 - _USUAL_ERROR) * (1 + self.kind.published[1]) <= self.kind.offer.budget_bytes

    @property
    def may_fit(self) -> bool:
        """Whether a rehearsal's upper bound can be within the budget: its band about the lowest peak it may show."""
        low, high = self.kind.published
        return self.lower_bytes / (1 + low) * (1 + high) <= self.kind.offer.budget_bytes


def rank(candidates: Iterable[Candidate], goal: Goal) -> list[Candidate]:
    """Best first.

    Lightest: by peak, then by speed. Fastest: by tokens a second; cheapest: by tokens a dollar, or by what the offers
    are compared in (`Offer.cost_per_s`). Among those nearly equal in it by `Kind.quality`, then still by it, then the
    lighter.
    """
    if goal == "lightest":
        return sorted(candidates, key=lambda c: (c.peak_bytes, -c.tokens_per_s))
    worth = _tokens_per_s if goal == "fastest" else _tokens_per_cost
    best_first = sorted(candidates, key=worth, reverse=True)
    ranked: list[Candidate] = []
    for group in _groups(best_first, worth):
        ranked += sorted(group, key=lambda c: (c.kind.quality, -worth(c), c.peak_bytes, c.place))
    return ranked


def caution(recipe: Recipe) -> str | None:
    """What to know before training this recipe, if anything."""
    if loses_updates(recipe) and recipe.method == "full" and recipe.optimizer.rounding == "nearest":
        return (
            "all weights are trained in BF16 without an FP32 copy: updates below 1/256 of a weight are lost; "
            'optimizer.rounding = "stochastic" or precision.master = "fp32" avoids it'
        )
    return None


def loses_updates(recipe: Recipe) -> bool:
    """Whether what is trained is held in 16 bits alone."""
    precision = recipe.precision
    trained = precision.compute if precision.packed else precision.weights
    return trained != "fp32" and precision.master == "none"


def _tokens_per_s(candidate: Candidate) -> float:
    return candidate.tokens_per_s


def _tokens_per_cost(candidate: Candidate) -> float:
    return candidate.tokens_per_s / candidate.kind.offer.cost_per_s


def _groups(best_first: Sequence[Candidate], worth: Callable[[Candidate], float]) -> Iterator[list[Candidate]]:
    group: list[Candidate] = []
    least = 0.0
    for candidate in best_first:
        value = worth(candidate)
        if group and value < least:
            yield group
            group = []
        if not group:
            least = _NEARLY * value
        group.append(candidate)
    if group:
        yield group
