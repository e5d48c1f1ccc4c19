"""AdamW of 8-bit states against torch's AdamW, bitsandbytes' optimizer and the nearest code by trying all."""

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.optim.adamw import AdamW8bit as Theirs
from torch import Tensor, nn

from brim.layers import blockwise_adam
from brim.layers.blockwise_adam import Maps
from brim.layers.nearest_code import SIGNED, UNSIGNED, nearest_codes, table_of
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
def test_steps_are_adamws(dtype: torch.dtype, decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four steps, in parts of a few blocks, is torch's AdamW from the decoded states, and its new moments are
    held by their nearest codes."""
    monkeypatch.setattr(blockwise_adam, "_LEAST_AT_ONCE", 512)
    ours, maps = parameters(dtype), Maps.on(torch.device("cpu"))
    mine = AdamW8bit(list(ours), lr=1e-2, weight_decay=decay, maps=maps)
    for step in range(4):
        set_gradients(ours, step)
        copies = [nn.Parameter(parameter.detach().float()) for parameter in ours]
        exact = torch.optim.AdamW(copies, lr=1e-2, weight_decay=decay)
        for parameter, copy in zip(ours, copies, strict=True):
            assert parameter.grad is not None
            copy.grad = parameter.grad.float()
            exact.state[copy] = {
                "step": torch.tensor(float(step)),
                "exp_avg": moment(mine, parameter, 1, maps.signed),
                "exp_avg_sq": moment(mine, parameter, 2, maps.unsigned),
            }
        mine.step()
        exact.step()
        for parameter, copy in zip(ours, copies, strict=True):
            torch.testing.assert_close(parameter.detach(), copy.detach().to(dtype))
            for number, key, numbers in ((1, "exp_avg", maps.signed), (2, "exp_avg_sq", maps.unsigned)):
                check_nearest(mine, parameter, number, exact.state[copy][key], numbers)


def moment(optimizer: AdamW8bit, parameter: Tensor, number: int, numbers: Tensor) -> Tensor:
    """In FP32, by bitsandbytes' decoding."""
    state = optimizer.state[parameter]
    if not state:
        return torch.zeros(parameter.shape)
    stored: Tensor = state[f"state{number}"]
    if stored.dtype == torch.float32:
        return stored.clone()
    return dequantize_blockwise(stored, absmax=state[f"absmax{number}"], code=numbers, blocksize=256)


def check_nearest(optimizer: AdamW8bit, parameter: Tensor, number: int, expected: Tensor, numbers: Tensor) -> None:
    state, held = optimizer.state[parameter], moment(optimizer, parameter, number, numbers)
    if parameter.numel() < blockwise_adam.SMALLEST:
        torch.testing.assert_close(held, expected)
        return
    flat = expected.flatten()
    largest = torch.stack([block.abs().max() for block in flat.split(256)])
    torch.testing.assert_close(state[f"absmax{number}"], largest)
    scale = largest.repeat_interleave(256)[: flat.numel()]
    least = distances(flat / scale, numbers)
    assert bool((((held.flatten() - flat).abs() / scale) <= least + 1e-6).all())


def distances(values: Tensor, numbers: Tensor) -> Tensor:
    """From each value to the number that is nearest, one by one."""
    parts = values.double().split(4096)
    return torch.cat([(part[:, None] - numbers.double()).abs().amin(1) for part in parts])


@pytest.mark.parametrize("numbers", [SIGNED, UNSIGNED])
def test_codes_are_the_nearest(numbers: list[float]) -> None:
    """No number is nearer to a value than its code's, at any magnitude and on both sides of every midpoint."""
    generator, exact = torch.Generator().manual_seed(0), torch.tensor(numbers, dtype=torch.float64)
    middles = ((exact[1:] + exact[:-1]) / 2).float()
    random = [torch.randn(20_000, generator=generator).clamp(-1, 1) * 10.0**-power for power in range(9)]
    ends = torch.tensor([0.0, -0.0, 1.0, -1.0])
    sides = [torch.nextafter(middles, torch.tensor(end)) for end in (-2.0, 2.0)]
    values = torch.cat([*random, ends, middles, *sides])
    codes = nearest_codes(values.clone(), torch.tensor(table_of(numbers))).to(torch.uint8)
    apart = (values.double() - exact[codes.long()]).abs()
    wrong = apart > distances(values, exact) + 2e-7 * values.double().abs()
    assert not wrong.any(), (values[wrong], apart[wrong])


def test_states_are_bitsandbytes() -> None:
    """States have bitsandbytes' names, shapes, formats and scales, and nearly all of its codes after a step; its CPU
    kernel finds the others by a table that is too coarse for small values."""
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    mine = AdamW8bit(list(ours), lr=1e-2, weight_decay=0.0, maps=Maps.on(torch.device("cpu")))
    other = Theirs(theirs, lr=1e-2, weight_decay=0.0)
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    mine.step()
    other.step()
    for parameter, expected in zip(ours, theirs, strict=True):
        state, theirs_state = mine.state[parameter], other.state[expected]
        assert {name for name in theirs_state if "qmap" not in name} == state.keys()
        for name in state.keys() - {"step"}:
            assert (state[name].dtype, state[name].shape) == (theirs_state[name].dtype, theirs_state[name].shape)
            if name.startswith("absmax"):
                torch.testing.assert_close(state[name], theirs_state[name])
            elif state[name].dtype == torch.uint8:
                assert float((state[name] == theirs_state[name]).float().mean()) > 0.95
        torch.testing.assert_close(parameter.detach(), expected.detach())


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
