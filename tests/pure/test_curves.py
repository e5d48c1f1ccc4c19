"""Curves of a plan: each point is a recipe's own prediction, and the picture shows those numbers."""

from pathlib import Path

import numpy as np
import pytest

from brim.cli import main
from brim.hardware import find
from brim.models import describe
from brim.planning.curves import Curve, curves
from brim.planning.estimate import estimate
from brim.planning.picture import figure_of
from brim.recipe import Recipe
from brim.units import GIB

SPEC, GPU = describe("llama-3.1-8b"), find("rtx-4090")
RECIPE = Recipe(model="llama-3.1-8b").with_settings(["method=lora", "seq_len=512"])
KEYS = {
    "tokens of a row": "seq_len={}",
    "rows of a micro-batch": "micro_batch_size={}",
    "rank of the adapters": "lora.rank={}",
}


@pytest.fixture(scope="module")
def found() -> dict[str, Curve]:
    return {curve.name: curve for curve in curves(SPEC, RECIPE, device=GPU, budget_bytes=24 * GIB)}


def test_each_point_is_that_recipes_own_prediction(found: dict[str, Curve]) -> None:
    for name, key in KEYS.items():
        for value, prediction in found[name].points:
            recipe = RECIPE.with_settings([key.format(value)])
            assert prediction == estimate(SPEC, recipe, device=GPU, budget_bytes=24 * GIB)
    assert all(curve.now in dict(curve.points) for curve in found.values())


def test_more_tokens_rows_and_rank_never_need_less_and_more_gpus_never_hold_more(found: dict[str, Curve]) -> None:
    for name in KEYS:
        peaks = [prediction.peak.highest_bytes for _, prediction in found[name].points]
        assert peaks == sorted(peaks)
    shares = [each.ledger.weights + each.ledger.optimizer for _, each in found["GPUs"].points]
    assert shares == sorted(shares, reverse=True)


def test_a_picture_shows_the_peaks_and_the_budget(found: dict[str, Curve]) -> None:
    """In every panel: the line of peaks, the budget across, and the recipe itself."""
    best = estimate(SPEC, RECIPE, device=GPU, budget_bytes=24 * GIB)
    figure = figure_of(list(found.values()), best, title="t")
    for curve, axes in zip(found.values(), figure.axes, strict=False):
        peaks, budget, dot = axes.get_lines()
        assert [round(y * GIB) for y in np.asarray(peaks.get_ydata()).tolist()] == [
            p.peak.highest_bytes for _, p in curve.points
        ]
        assert set(np.asarray(budget.get_ydata()).tolist()) == {24.0}
        assert np.asarray(dot.get_xdata()).tolist() == [curve.now]


def test_a_plan_is_drawn_even_where_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture then is of the lightest recipe; the exit code is still 3."""
    pinned = ["--set", "memory.offload=none", "--set", "optimizer.name=adamw"]
    asked = ["plan", "llama-3.1-8b", "--gpu", "rtx-4090", "--quick", "--method", "full", *pinned]
    drawn = tmp_path / "c.svg"
    assert main([*asked, "--plot", str(drawn)]) == 3
    assert "lightest" in capsys.readouterr().err
    assert drawn.read_text(encoding="utf-8").startswith("<?xml")
    assert main([*asked, "--plot", str(tmp_path / "c.pdf")]) == 2
