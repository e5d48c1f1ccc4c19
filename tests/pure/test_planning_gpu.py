"""Laws of plans for GPUs, one and several, without a torch to rehearse with."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from brim.errors import UsageError
from brim.hardware import find
from brim.memory import closed_form
from brim.memory.bands import gpu_band
from brim.models import describe
from brim.planning import Constraints, NothingFitsError, Offer, plan
from brim.planning.candidates import candidates
from brim.planning.estimate import estimate
from brim.planning.ranking import Goal
from brim.planning.search import NUM_FINALISTS
from brim.recipe import Recipe
from brim.report import Prediction

GPU, CARD = find("h100"), find("rtx-4090")
LARGE = describe("llama-3.1-8b")
H100 = Offer(device=GPU, budget_bytes=GPU.memory_bytes)


def test_several_devices_are_all_used() -> None:
    """Every candidate is of all the devices, says what they share, and takes the rows that were asked for."""
    asked = Constraints(method="full", devices_per_node=4, nodes=2, global_batch_size=64)
    found = candidates(LARGE, asked)
    assert {recipe.parallel.devices for recipe in found} == {8}
    assert {"zero2", "zero3", "hsdp"} <= {recipe.parallel.sharding for recipe in found}
    assert {recipe.rows_per_step for recipe in found} == {64}


def test_rows_that_devices_cannot_share_are_refused_with_both() -> None:
    """The two that contradict each other are named, and the nearest that goes."""
    with pytest.raises(UsageError, match=r"--global-batch-size 12 and 8 devices contradict .*--global-batch-size 8"):
        candidates(LARGE, Constraints(devices_per_node=8, global_batch_size=12, settings=("parallel.tensor=1",)))


def test_what_does_not_fit_one_device_fits_several() -> None:
    """Full training of 8B with FP32 masters is too much for one 80 GB card, and is divided among eight."""
    method = Constraints(
        method="full", settings=("precision.master=fp32", "memory.offload=none", "optimizer.name=adamw")
    )
    with pytest.raises(NothingFitsError, match=r"--gpus \d \(about"):
        plan(LARGE, [H100], rehearse=None, constraints=method)
    result = plan(LARGE, [replace(H100, devices_per_node=8)], rehearse=None, constraints=method)
    assert result.best is not None
    assert result.best.recipe["parallel"]["sharding"] in ("zero1", "zero2", "zero3")


@pytest.mark.parametrize("goal", ["fastest", "lightest"])
def test_a_quick_plan_rehearses_nothing(goal: Goal) -> None:
    """By closed form alone: those that fit come first in the goal's order, the others follow with their reasons."""
    result = plan(LARGE, [H100], rehearse=None, goal=goal)
    fits = [p.fits for p in result.recipes]
    assert fits == sorted(fits, reverse=True) and fits[0] and not fits[-1]
    assert {p.method for p in result.recipes} == {"closed-form"}
    assert all(p.reasons for p in result.recipes if not p.fits)


def test_only_what_can_fit_its_published_band_is_rehearsed() -> None:
    """On a GPU a rehearsal's upper bound is the published band above its peak; none is made whose bound must be over.

    So rehearsals are left for what fits: the finalists are as many as asked for.
    """
    asked = list[Prediction]()

    def rehearse(recipe: Recipe, offer: Offer) -> Prediction:
        quick = estimate(LARGE, recipe, device=CARD, budget_bytes=CARD.memory_bytes)
        asked.append(replace(quick, method="rehearsal", error_band=gpu_band(recipe)))
        return asked[-1]

    result = plan(LARGE, [Offer(device=CARD, budget_bytes=CARD.memory_bytes)], rehearse=rehearse)
    assert sum(p.fits and p.method == "rehearsal" for p in result.recipes) == NUM_FINALISTS
    slack = 1 + closed_form.ERROR_BAND[0]
    assert all(p.peak.highest_bytes * slack * (1 + p.error_band[1]) <= p.budget_bytes for p in asked)


def test_a_quick_plan_needs_no_torch() -> None:
    """The command itself: torch is not imported, which alone takes seconds."""
    code = (
        "import sys; from brim import cli;"
        "cli.main(['plan', 'llama-3.1-8b', '--gpu', 'rtx-4090', '--quick', '--json']); sys.exit('torch' in sys.modules)"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["fits"]
