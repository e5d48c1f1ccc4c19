"""Recipes and workloads over tiny models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from brim.models import describe
from brim.recipe import Precision, Recipe, Training
from brim.report import Ledger, Peak, Prediction
from brim.training.build import Workload, build
from brim.training.data import tokenize
from brim.training.job import Run
from brim.training.layouts import Row

MakeRecipe = Callable[..., Recipe]
MakeWorkload = Callable[[Recipe], Workload]


@pytest.fixture(scope="session")
def make_recipe(tiny_directory: Callable[[str], Path]) -> MakeRecipe:
    """Family and settings -> an FP32 recipe of two rows of 16 tokens."""

    def make(family: str, **settings: Any) -> Recipe:
        source = str(tiny_directory(family))
        recipe = Recipe(
            model=source,
            task=describe(source).task,
            seq_len=16,
            micro_batch_size=2,
            precision=Precision(weights="fp32", compute="fp32"),
        )
        recipe = replace(recipe, **settings)
        # transformers 5.23 has no other attention for Gemma 2.
        return replace(recipe, memory=replace(recipe.memory, attention="eager")) if family == "gemma2" else recipe

    return make


@pytest.fixture(scope="session")
def make_workload() -> MakeWorkload:
    """Recipe -> its model with the weights of the directory it names, and its optimizer."""

    def make(recipe: Recipe) -> Workload:
        return build(recipe, describe(recipe.model), weights=Path(recipe.model))

    return make


TEXT = "Filled to the brim and never over it; measured twice, predicted once.\n" * 6
MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(make_recipe: MakeRecipe, tiny_directory: Callable[[str], Path], tokenizer: Any, tmp_path: Path) -> MakeRun:
    """Family, settings and places -> a run over a short text, six steps long."""

    def make(
        family: str,
        *,
        output: Path | None = None,
        resume: bool = False,
        held: bool = False,
        cap_bytes: int | None = None,
        **settings: Any,
    ) -> Run:
        recipe = make_recipe(family, **{"training": Training(max_steps=6), **settings})
        lines = [
            Row("say it", line) if recipe.task == "seq2seq-lm" else Row("", line) for line in TEXT.split("\n")[:-1]
        ]
        data = tokenize(lines, tokenizer, recipe)
        return Run(
            recipe=recipe,
            spec=describe(recipe.model),
            weights=Path(recipe.model),
            tokenizer=tokenizer,
            data=data,
            held=tokenize(lines[:1], tokenizer, recipe) if held else None,
            output=output or tmp_path / "out",
            predicted=prediction_of(recipe),
            resume=resume,
            cap_bytes=cap_bytes,
        )

    return make


def prediction_of(recipe: Recipe) -> Prediction:
    return Prediction(
        model=recipe.model,
        recipe=recipe.to_dict(),
        device_name="cpu",
        budget_bytes=2**30,
        peak=Peak(allocated_bytes=1000),
        ledger=Ledger(weights=600, optimizer=400),
        step_time_s=0.5,
        tokens_per_s=64.0,
        method="rehearsal",
        error_band=(0.0, 0.0),
    )
