"""Lion: the sign of an interpolated momentum is the step (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

One state and, while a parameter is stepped, one temporary of its size. Step with a learning rate 3 to 10 times
smaller than AdamW's, as the paper advises: every element moves by all of it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_BETAS = (0.9, 0.99)


class Lion(torch.optim.Optimizer):
    """m: momentum, g: gradient. p -= rate * (sign(0.9 m + 0.1 g) + decay p), then m = 0.99 m + 0.01 g."""

    def __init__(self, parameters: Iterable[Any], *, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not used."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, rate=group["lr"], decay=group["weight_decay"])

    def _step_one(self, parameter: Tensor, gradient: Tensor, *, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        momentum = state["exp_avg"]
        parameter.mul_(1 - rate * decay)
        parameter.add_(momentum.lerp(gradient, 1 - _BETAS[0]).sign_(), alpha=-rate)
        momentum.lerp_(gradient, 1 - _BETAS[1])
