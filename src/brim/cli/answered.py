"""The exact prediction of a recipe, from the answers that were kept or rehearsed now: torch is imported only then."""

from brim import answers
from brim.cli.starting import quick_imports
from brim.hardware import Device
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.report import Prediction


def rehearsed(
    spec: ModelSpec,
    recipe: Recipe,
    device: Device,
    budget_bytes: int,
    risk: float,
    *,
    new_tokens: int | None = None,
    anew: bool = False,
) -> Prediction:
    """Of a training step, or of writing `new_tokens` where they are given; `anew`: kept answers are not looked at."""
    key = answers.question(spec, recipe, device, risk=risk, new_tokens=new_tokens)
    if not anew and (kept := answers.recall(key, recipe, device, budget_bytes=budget_bytes)) is not None:
        return kept
    with quick_imports():
        from brim.rehearsal import rehearse, rehearse_inference

    if new_tokens is None:
        found = rehearse(spec, recipe, device=device, budget_bytes=budget_bytes, risk=risk)
    else:
        found = rehearse_inference(
            spec, recipe, new_tokens=new_tokens, device=device, budget_bytes=budget_bytes, risk=risk
        )
    answers.keep(key, found)
    return found
