"""Recipes and workloads over tiny models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from brim.models import describe
from brim.recipe import Precision, Recipe
from brim.training.build import Workload, build

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
