"""What optimizers of ours share: one parameter is stepped after the other, so that one at a time takes room."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


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
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, rate=group["lr"], decay=group["weight_decay"])

    @abstractmethod
    def _step_one(self, parameter: Tensor, gradient: Tensor, *, rate: float, decay: float) -> None:
        """Update a parameter and its state in place."""
