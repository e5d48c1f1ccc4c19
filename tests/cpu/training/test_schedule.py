"""The learning rate against transformers' and torch's own schedules."""

from typing import Literal

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from brim.recipe import Optimizer, Recipe, Training
from brim.training.schedule import learning_rate

FULL = 3e-4


Schedule = Literal["constant", "linear", "cosine"]


def ours(schedule: Schedule, warmup: int, steps: int) -> list[float]:
    training = Training(warmup_steps=warmup, schedule=schedule)
    recipe = Recipe(model="any", optimizer=Optimizer(learning_rate=FULL), training=training)
    return [learning_rate(recipe, step, steps) for step in range(steps)]


def walked(scheduler: LambdaLR, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=FULL)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 20), (5, 20), (1, 7), (19, 20)])
def test_schedules(warmup: int, steps: int) -> None:
    """After warm-up: cosine to a tenth as in transformers, linear to a tenth as in torch, constant at the full rate."""
    cosine = get_cosine_with_min_lr_schedule_with_warmup(optimizer(), warmup, steps, min_lr_rate=0.1)
    assert ours("cosine", warmup, steps)[warmup:] == pytest.approx(walked(cosine, steps)[warmup:])
    linear = torch.optim.lr_scheduler.LinearLR(optimizer(), 1.0, 0.1, total_iters=steps - warmup)
    assert ours("linear", warmup, steps)[warmup:] == pytest.approx(walked(linear, steps - warmup))  # type: ignore[arg-type]
    assert ours("constant", warmup, steps)[warmup:] == [FULL] * (steps - warmup)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup(schedule: Schedule) -> None:
    """Warm-up rises in equal parts and is at the full rate in its last step, never at zero."""
    rates = ours(schedule, 4, 10)
    assert rates[:4] == pytest.approx([FULL / 4, FULL / 2, FULL * 3 / 4, FULL])
    assert max(rates) == FULL
    assert min(rates) > 0


def test_warmup_longer_than_the_run() -> None:
    """Warm-up past the end only rises."""
    assert ours("cosine", 100, 10) == pytest.approx([FULL * (step + 1) / 100 for step in range(10)])
