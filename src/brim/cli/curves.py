"""`--plot FILE` of a plan: how the best recipe's peak grows, asked of the planner and drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from brim.cli import picture
from brim.models import ModelSpec
from brim.planning import Offer
from brim.planning.curves import curves
from brim.planning.ways_out import summary
from brim.recipe import Recipe
from brim.report import Plan

Plot = Annotated[
    Path | None,
    typer.Option(
        help="Draw the best recipe's peak against rows, tokens, rank and GPUs: FILE.svg, FILE.png or FILE.html.",
        show_default=False,
    ),
]


def draw(path: Path | None, spec: ModelSpec, result: Plan, offers: Sequence[Offer], risk: float) -> None:
    """Of the first recipe: the best, or the lightest where nothing fits. The file appears whole."""
    if path is None:
        return
    from brim.planning.picture import draw_curves

    best = result.recipes[0]
    device = next(offer.device for offer in offers if offer.device.name == best.device_name)
    found = curves(spec, Recipe.from_dict(best.recipe), device=device, budget_bytes=best.budget_bytes, risk=risk)
    how = "rehearsed" if best.method == "rehearsal" else "by closed form"
    what = f"{spec.name} on {device.name}: {summary(best)}"
    title = f"{what}\ndot: this recipe, {how}; curves: by closed form; grey: what may come on top"
    with picture.whole(path) as partial:
        draw_curves(partial, found, best, title=title)
