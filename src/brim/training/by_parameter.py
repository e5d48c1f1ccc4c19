"""What optimizers of ours share: one parameter is stepped after the other, so that one at a time takes room.

Of a parameter that is spread over ranks each steps its part, and has the states of that.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from brim.training.parts import part_of, spread_as


class ByParameter(torch.optim.Optimizer):
    """An optimizer of torch's kind, with a learning rate and a weight decay for each group of parameters."""

    def __init__(self, parameters: Iterable[Any], *, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not used."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                # few rows over many ranks: some have none
                if parameter.grad is not None and part_of(parameter).numel():
                    gradient = part_of(spread_as(parameter.grad, parameter))
                    state = self.state[parameter]
                    self._step_one(part_of(parameter), gradient, state, rate=group["lr"], decay=group["weight_decay"])

    @abstractmethod
    def _step_one(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], *, rate: float, decay: float
    ) -> None:
        """Update a parameter, or this rank's part of it, and its state in place; an empty state is to be begun."""
