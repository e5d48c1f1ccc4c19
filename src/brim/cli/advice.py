"""What would save most, under a prediction: asked of the planner, and printed."""

from collections.abc import Sequence

from brim.cli import console
from brim.cli.answered import rehearsed
from brim.hardware import Device
from brim.models import ModelSpec
from brim.planning import advise
from brim.planning.advice import SHORT_LIST
from brim.planning.estimate import estimate
from brim.recipe import Recipe
from brim.report import Advice, Prediction
from brim.units import format_bytes


def of(
    spec: ModelSpec, recipe: Recipe, now: Prediction, device: Device, risk: float, *, is_short: bool, anew: bool
) -> tuple[Advice, ...]:
    """Levers in the way that the prediction was made; the short list has only the most promising."""

    def predict(changed: Recipe) -> Prediction:
        if now.method == "closed-form":
            return estimate(spec, changed, device=device, budget_bytes=now.budget_bytes)
        return rehearsed(spec, changed, device, now.budget_bytes, risk, anew=anew)

    num_tried = SHORT_LIST if is_short else None
    with console.progress("trying what would save memory") as progress:
        return advise(spec, recipe, now, device=device, predict=predict, num_tried=num_tried, progress=progress)


def show(now: Prediction, given: Sequence[Advice], *, is_short: bool) -> None:
    """The most saving first: two lines each, of which the first can be typed again."""
    if not given:
        console.out.print("No lever would lower this peak.")
        return
    how = "by closed form" if now.method == "closed-form" else "rehearsed"
    console.out.print(f"What would save most, each alone ({how}):")
    for advice in given:
        settings = " ".join(f"--set {setting}" for setting in advice.settings)
        outcome = f"peak {format_bytes(advice.peak_bytes)}, {'fits' if advice.fits else 'does not fit'}"
        console.out.print(f"{format_bytes(advice.saved_bytes):>9}  {settings}", markup=False, soft_wrap=True)
        console.out.print(f"{'':9}  {outcome}, {_speed(now, advice)}; {advice.cost}", markup=False, soft_wrap=True)
    if is_short:
        console.note("more of them with --advice; brim plan looks for whole recipes that fit")


def _speed(now: Prediction, advice: Advice) -> str:
    change = round(100 * (advice.tokens_per_s / now.tokens_per_s - 1))
    return f"tokens/s {change:+d} %" if change else "tokens/s the same"
