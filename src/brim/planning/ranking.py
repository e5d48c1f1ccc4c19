"""The order of recipes for a goal. Deterministic: equal keys fall back to the recipe's own text."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from brim.report import Prediction

Goal = Literal["fastest", "lightest"]

_NEARLY = 0.95
"""Recipes within 5 % of a group's fastest count as equally fast: the roofline cannot tell them apart."""


def rank(predictions: Iterable[Prediction], goal: Goal) -> list[Prediction]:
    """Best first.

    Lightest: by peak, then by speed. Fastest: by tokens per second; among those nearly equal in it, first what keeps
    FP32 copies of the trained weights (pure BF16 loses small updates), adapters before full fine-tuning among those
    that do not, a base as it is before a packed one, whole optimizer states before those of 8 bits, then the lighter.
    """
    if goal == "lightest":
        return sorted(predictions, key=_by_weight)
    by_speed = sorted(predictions, key=lambda p: (-p.tokens_per_s, _text(p)))
    return [prediction for group in _speed_groups(by_speed) for prediction in sorted(group, key=_by_quality)]


def caution(prediction: Prediction) -> str | None:
    """What to know before training this recipe, if anything."""
    if _loses_updates(prediction) and prediction.recipe["method"] == "full":
        return (
            "all weights are trained in BF16 without an FP32 copy: updates below 1/256 of a weight are lost; "
            'precision.master = "fp32" avoids it'
        )
    return None


def kind_of(prediction: Prediction) -> tuple[Any, ...]:
    """What makes two finalists worth showing side by side: another method or another precision."""
    recipe = prediction.recipe
    return (recipe["method"], *recipe["precision"].values())


def _speed_groups(by_speed: Sequence[Prediction]) -> Iterable[list[Prediction]]:
    group: list[Prediction] = []
    for prediction in by_speed:
        if group and prediction.tokens_per_s < _NEARLY * group[0].tokens_per_s:
            yield group
            group = []
        group.append(prediction)
    if group:
        yield group


def _loses_updates(prediction: Prediction) -> bool:
    precision = prediction.recipe["precision"]
    trained = precision["compute"] if _is_packed(prediction) else precision["weights"]
    return trained != "fp32" and precision["master"] == "none"


def _is_packed(prediction: Prediction) -> bool:
    return prediction.recipe["method"] == "qlora"


def _by_quality(prediction: Prediction) -> tuple[Any, ...]:
    loses = _loses_updates(prediction)
    return (
        loses,
        loses and prediction.recipe["method"] == "full",
        _is_packed(prediction),
        prediction.recipe["optimizer"]["name"] == "adamw8bit",
        prediction.peak.highest_bytes,
        _text(prediction),
    )


def _by_weight(prediction: Prediction) -> tuple[Any, ...]:
    return (prediction.peak.highest_bytes, -prediction.tokens_per_s, _text(prediction))


def _text(prediction: Prediction) -> str:
    return repr(prediction.recipe)
