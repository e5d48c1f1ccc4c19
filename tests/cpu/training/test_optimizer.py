"""Each optimizer's steps against its paper or torch's own, on the same gradients."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from brim.memory.states import state_cost
from brim.recipe import Optimizer
from brim.training.optimizer import Stepper

Textbook = Callable[[list[nn.Parameter]], Callable[[float], None]]
RATES = (1e-2, 5e-3, 2e-3)
DECAY = 0.1


def sgd_by_torch(parameters: list[nn.Parameter]) -> Callable[[float], None]:
    return stepped_by(torch.optim.SGD(parameters, momentum=0.9, weight_decay=DECAY, fused=True))


def adafactor_by_torch(parameters: list[nn.Parameter]) -> Callable[[float], None]:
    return stepped_by(torch.optim.Adafactor(parameters, weight_decay=DECAY, foreach=True))


def stepped_by(optimizer: torch.optim.Optimizer) -> Callable[[float], None]:
    def step(rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

    return step


def lion_by_paper(parameters: list[nn.Parameter]) -> Callable[[float], None]:
    """Algorithm 2 of arXiv 2302.06675, in FP64: c = b1 m + (1 - b1) g; w -= eta (sign(c) + lambda w)."""
    momenta = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]

    def step(rate: float) -> None:
        for parameter, m in zip(parameters, momenta, strict=True):
            assert parameter.grad is not None
            w, g = parameter.detach().double(), parameter.grad.double()
            parameter.data.copy_(w - rate * (torch.sign(0.9 * m + 0.1 * g) + DECAY * w))
            m.copy_(0.99 * m + 0.01 * g)

    return step


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 7), (7,), (2, 3, 4))]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(p.shape, generator=generator) for p in parameters()]


@pytest.mark.parametrize(
    ("name", "textbook"), [("sgd", sgd_by_torch), ("adafactor", adafactor_by_torch), ("lion", lion_by_paper)]
)
@pytest.mark.parametrize("fp32_master", [False, True])
def test_steps_are_the_textbooks(
    name: Literal["sgd", "adafactor", "lion"], textbook: Textbook, fp32_master: bool
) -> None:
    """Three steps on the same gradients, rates changing, end where the textbook's do; gradients are freed."""
    ours, theirs = parameters(), parameters()
    stepper = Stepper(ours, Optimizer(name=name, weight_decay=DECAY), fp32_master=fp32_master)
    step_theirs = textbook(theirs)
    for index, rate in enumerate(RATES):
        for mine, other, gradient in zip(ours, theirs, gradients(index), strict=True):
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        stepper.set_learning_rate(rate)
        stepper.step()
        step_theirs(rate)
    assert all(parameter.grad is None for parameter in ours)
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "lion"])
def test_a_late_first_gradient(name: Literal["sgd", "lion"]) -> None:
    """A parameter whose first gradient comes later than the others' (an expert) is left alone until then."""
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    stepper = Stepper([first, second], Optimizer(name=name), fp32_master=False)
    first.grad = torch.ones(2)
    stepper.set_learning_rate(0.1)
    stepper.step()
    assert torch.equal(second, torch.ones(2))
    first.grad, second.grad = torch.ones(2), torch.ones(2)
    stepper.set_learning_rate(0.1)
    stepper.step()
    assert torch.equal(second.detach(), torch.ones(2) - 0.1)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd", "lion", "adafactor"])
def test_the_estimates_know_the_states(name: Literal["adamw", "adamw8bit", "sgd", "lion", "adafactor"]) -> None:
    """The table that the estimates read counts the states that the optimizer makes, but for 2 % (rows and columns)."""
    weight = nn.Parameter(torch.ones(256, 256))
    stepper = Stepper([weight], Optimizer(name=name), fp32_master=False)
    weight.grad = torch.ones_like(weight)
    stepper.set_learning_rate(0.1)
    stepper.step()
    states = sum(tensor.nbytes for tensor in stepper.tensors_of(weight))
    estimated = state_cost(Optimizer(name=name)).state_bytes(weight.numel(), 4)
    assert estimated <= states < estimated + 0.08 * weight.numel()
