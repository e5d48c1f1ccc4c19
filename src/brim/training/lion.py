"""Lion: the sign of an interpolated momentum is the step (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

One state and, while a parameter is stepped, one temporary of its size. Step with a learning rate 3 to 10 times
smaller than AdamW's, as the paper advises: every element moves by all of it.
"""

import torch
from torch import Tensor

from brim.training.by_parameter import ByParameter

_BETAS = (0.9, 0.99)


class Lion(ByParameter):
    """m: momentum, g: gradient. p -= rate * (sign(0.9 m + 0.1 g) + decay p), then m = 0.99 m + 0.01 g."""

    def _step_one(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], *, rate: float, decay: float
    ) -> None:
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        momentum = state["exp_avg"]
        parameter.mul_(1 - rate * decay)
        parameter.add_(momentum.lerp(gradient, 1 - _BETAS[0]).sign_(), alpha=-rate)
        momentum.lerp_(gradient, 1 - _BETAS[1])
