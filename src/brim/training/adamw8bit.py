"""AdamW whose moments take one byte each (`brim.layers.blockwise_adam`), as an optimizer of torch's kind.

How this differs from bitsandbytes' own: it steps in parts on a CPU, its state is tensors alone (so that a checkpoint
holds it), and it can be made from fake parameters.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from brim.layers.blockwise_adam import Maps, adam_update, new_state
from brim.training.by_parameter import ByParameter


class AdamW8bit(ByParameter):
    """States: `state1`, `state2` (codes; FP32 for small parameters), `absmax1`, `absmax2`, and `step`."""

    def __init__(
        self, parameters: Iterable[Any], *, lr: float, weight_decay: float, maps: Maps, by_chance: bool = False
    ) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self._maps = maps
        self._by_chance = by_chance

    def _step_one(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], *, rate: float, decay: float
    ) -> None:
        if not state:
            # on the CPU wherever the parameter is: it is read as a number
            state |= {"step": torch.zeros((), device="cpu"), **new_state(parameter)}
        state["step"] += 1
        moments = {name: tensor for name, tensor in state.items() if name != "step"}
        adam_update(
            parameter, gradient, moments, self._maps,
            step=int(state["step"].item()), rate=rate, decay=decay, by_chance=self._by_chance,
        )  # fmt: skip
