"""AdamW over BF16 weights and states that are rounded by chance (`brim.layers.stochastic_rounding`).

How this differs from `torch.optim.AdamW` over BF16 parameters: that rounds to nearest, so small updates are lost, and
so is the decay of the second moment, 0.1 % a step where BF16's numbers are 0.4 % or more apart. torch's fused kernel
does the arithmetic here too, in FP32 on a part of a parameter at a time.
"""

from math import ceil

import torch
from torch import Tensor

from brim.layers.stochastic_rounding import noise_like, round_by_chance
from brim.training.by_parameter import ByParameter

_LEAST_AT_ONCE = 2**18
_MOST_PARTS = 16


class RoundedAdamW(ByParameter):
    """States: `exp_avg` and `exp_avg_sq` in the parameter's format, and `step`, as torch's AdamW has them."""

    def _step_one(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], *, rate: float, decay: float
    ) -> None:
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        whole = [t.view(-1) for t in (parameter.detach(), gradient.contiguous(), state["exp_avg"], state["exp_avg_sq"])]
        size = max(_LEAST_AT_ONCE, ceil(parameter.numel() / _MOST_PARTS))
        for start in range(0, parameter.numel(), size):
            _update([tensor[start : start + size] for tensor in whole], state["step"], rate=rate, decay=decay)


def _update(stored: list[Tensor], step: Tensor, *, rate: float, decay: float) -> None:
    """`stored`: weight, gradient and moments. FP32 ones (learned scales) are stepped as they are."""
    exact = [tensor.float() for tensor in stored]
    weight, gradient, first, second = exact
    torch._fused_adamw_(
        [weight], [gradient], [first], [second], [], [step],
        lr=rate, beta1=0.9, beta2=0.999, weight_decay=decay, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
    if stored[0].dtype == torch.float32:
        return
    del exact, gradient
    stored[2].copy_(first)
    del first
    noise = noise_like(weight)
    stored[0].copy_(round_by_chance(weight, noise))
    stored[3].copy_(round_by_chance(second, noise))
