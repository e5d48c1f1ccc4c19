"""AdamW of 8-bit states against bitsandbytes' own optimizer."""

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit as Theirs
from torch import Tensor, nn

from brim.layers import blockwise_adam
from brim.layers.blockwise_adam import Maps
from brim.memory.measured import CpuMeter
from brim.memory.states import state_cost
from brim.recipe import Optimizer
from brim.training.adamw8bit import AdamW8bit

SHAPES = ((96, 300), (4096,), (4097,), (3, 50, 70), (63,))
"""Blocks that end with the parameter and blocks that do not; one parameter too small for 8 bits."""


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(owned: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for parameter in owned:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_and_states_are_bitsandbytes(dtype: torch.dtype, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """After four steps in parts of a few blocks, weights and states are bit by bit those of bitsandbytes' whole step.

    Of the parameter that keeps FP32 states: within FP32's rounding, since bitsandbytes orders that formula otherwise.
    """
    monkeypatch.setattr(blockwise_adam, "_LEAST_AT_ONCE", 512)
    ours, theirs = parameters(dtype), parameters(dtype)
    mine = AdamW8bit(list(ours), lr=1e-2, weight_decay=decay, maps=Maps.on(torch.device("cpu")))
    other = Theirs(theirs, lr=1e-2, weight_decay=decay)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        mine.step()
        other.step()
    for parameter, expected in zip(ours, theirs, strict=True):
        state, theirs_state = mine.state[parameter], other.state[expected]
        assert {name for name in theirs_state if "qmap" not in name} == state.keys()
        exact = parameter.numel() >= blockwise_adam.SMALLEST
        compare = assert_equal if exact else torch.testing.assert_close
        compare(parameter.detach(), expected.detach())
        for name in state.keys() - {"step"}:
            compare(state[name], theirs_state[name])
        assert int(state["step"]) == theirs_state["step"] == 4


def assert_equal(one: Tensor, other: Tensor) -> None:
    assert one.dtype == other.dtype
    assert torch.equal(one, other)


def test_the_maps_are_bitsandbytes() -> None:
    """The numbers that codes stand for are the ones that bitsandbytes decodes by."""
    theirs = Theirs([nn.Parameter(torch.ones(1))])
    maps = Maps.on(torch.device("cpu"))
    assert_equal(maps.signed, theirs.name2qmap["dynamic"])
    assert_equal(maps.unsigned, theirs.name2qmap["udynamic"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [2**17, 2**19, 2**23])
def test_the_estimates_know_the_parts(elements: int, dtype: torch.dtype) -> None:
    """The estimate of a step's temporaries is what the step allocates beyond its states, within 15 %."""
    parameter = nn.Parameter(torch.zeros(elements, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = AdamW8bit([parameter], lr=1e-2, weight_decay=0.0, maps=Maps.on(torch.device("cpu")))
    optimizer.step()
    with CpuMeter() as meter:
        optimizer.step()
        meter.sample()
    estimated = state_cost(Optimizer(name="adamw8bit")).temporary_bytes(elements, dtype.itemsize)
    assert meter.peak.allocated_bytes == pytest.approx(estimated, rel=0.15)
