"""Dynamic loss scaling: FP16's smallest number is 6e-8, so the loss is multiplied before backward, gradients after it.

How this differs from `torch.amp.GradScaler`: gradients in FP16 are allowed (that refuses them), since they are made
FP32 before they are divided, one at a time; and the norm of all gradients, which clipping needs, is also what tells
that one of them has overflowed. Constants are GradScaler's.
"""

import math

import torch
from torch import Tensor

_START = 2.0**16
_GROWTH_STEPS = 2000
_LEAST = 1.0


class LossScale:
    """The factor: doubled after 2000 good steps, halved by a step whose gradients overflowed, which is skipped."""

    def __init__(self) -> None:
        self.value = _START
        self.skipped = False
        """Whether the last step was."""
        self._good_steps = 0

    def update(self, *, finite: bool) -> None:
        """After each backward: whether all gradients were numbers."""
        self.skipped = not finite
        self._good_steps = self._good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self._good_steps == _GROWTH_STEPS:
            self.value, self._good_steps = 2 * self.value, 0

    @property
    def exhausted(self) -> bool:
        """Gradients overflow at every scale that could help."""
        return self.value < _LEAST

    def state(self) -> Tensor:
        return torch.tensor([self.value, self._good_steps], dtype=torch.float64)

    def load_state(self, state: Tensor) -> None:
        value, good_steps = state.tolist()
        self.value, self._good_steps = value, int(good_steps)


def unscaling(norm: Tensor, scale: LossScale, *, max_norm: float) -> float | None:
    """What gradients are to be multiplied by: 1 / scale, or less where clipping asks for it; None: skip this step."""
    scaled_norm = norm.item()
    if not math.isfinite(scaled_norm):
        return None
    unscaled_norm = scaled_norm / scale.value
    clipping = min(1.0, max_norm / (unscaled_norm + 1e-6)) if max_norm else 1.0
    return clipping / scale.value
