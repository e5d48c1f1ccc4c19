"""BF16 weights rounded by chance: unbiased, and what small updates add up to is learned."""

from typing import Literal

import pytest
import torch
from torch import nn

from brim.errors import RecipeError
from brim.layers.stochastic_rounding import noise_like, round_by_chance
from brim.recipe import Optimizer, Precision, Recipe
from brim.training.optimizer import Stepper


def test_each_number_becomes_a_neighbour_and_their_mean_is_it() -> None:
    """Over 4,000 draws a number is one of the two BF16 numbers around it, and their mean within five deviations of it;
    both halves of the noise do so, and a BF16 number stays."""
    torch.manual_seed(0)
    exact = torch.cat([torch.randn(50) * 10.0**power for power in (-30, -3, 0, 8)])
    stays = exact.bfloat16().float()
    cut = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32)
    beyond = ((exact.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    rows = exact.repeat(4000, 1)
    noise = noise_like(rows)
    for _ in range(2):
        rounded = round_by_chance(rows.clone(), noise)
        assert bool(((rounded == cut) | (rounded == beyond)).all())
        deviation = (beyond - cut).abs().double() / 2 / 4000**0.5
        assert bool(((rounded.double().mean(0) - exact.double()).abs() <= 5 * deviation).all())
    assert torch.equal(round_by_chance(stays.clone(), noise_like(stays)), stays)


def test_any_two_elements_are_rounded_independently() -> None:
    """Over 4,000 draws the chances of a matrix's elements, in one row, one column or neither, are uniform and
    uncorrelated within five deviations, in both halves."""
    torch.manual_seed(0)
    draws = torch.stack([noise_like(torch.empty(2, 3)).flatten() for _ in range(4000)])
    for half in (draws & 0xFFFF, draws >> 16 & 0xFFFF):
        chances = half.double() / 2**16
        assert bool(((chances.mean(0) - 0.5).abs() < 5 * (1 / 12 / 4000) ** 0.5).all())
        assert bool((chances.T.corrcoef() - torch.eye(6)).abs().max() < 5 / 4000**0.5)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_small_updates_add_up(name: Literal["adamw", "adamw8bit"], in_backward: bool) -> None:
    """100 steps of 1e-5, each a fiftieth of BF16's at 0.1, move weights by 1e-3 in the mean as FP32 weights would; to
    nearest none moves at all."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.full((64, 128), 0.1, dtype=torch.bfloat16))
        start = float(weight.detach().float().mean())
        settings = Optimizer(name=name, rounding=rounding, in_backward=in_backward)
        stepper = Stepper([weight], settings, fp32_master=False)
        stepper.set_learning_rate(1e-5)
        for _ in range(100):
            weight.float().sum().backward()
            stepper.step()
        moved[rounding] = start - float(weight.detach().float().mean())
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(1e-3, rel=0.05)


def test_what_it_does_not_go_with() -> None:
    """Optimizers without it and copies of weights are refused with the nearest setting; without BF16 weights it is said
    to have no effect."""
    recipe = Recipe(model="m", optimizer=Optimizer(rounding="stochastic"))
    assert recipe.warnings() == []
    with pytest.raises(RecipeError, match=r'nearest: optimizer\.name = "adamw"'):
        recipe.with_settings(["optimizer.name=lion"])
    with pytest.raises(RecipeError, match=r'nearest: optimizer\.rounding = "nearest"'):
        recipe.with_settings(["parallel.devices_per_node=2", "parallel.sharding=zero1"])
    for precision in (Precision(master="fp32"), Precision(weights="fp32")):
        exact = Recipe(model="m", precision=precision, optimizer=recipe.optimizer)
        assert any("optimizer.rounding" in warning for warning in exact.warnings())
