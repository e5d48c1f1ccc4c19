"""The learning rate of each step."""

import math

from brim.recipe import Recipe


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warm-up, then constant, or linear or cosine down to a tenth."""
    full, warmup = recipe.optimizer.learning_rate, recipe.training.warmup_steps
    if step < warmup:
        return full * (step + 1) / warmup
    if recipe.training.schedule == "constant":
        return full
    done = (step - warmup) / max(1, steps - warmup)
    left = 1 - done if recipe.training.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return full * (0.1 + 0.9 * left)
