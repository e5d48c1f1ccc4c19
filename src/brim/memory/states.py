"""What an optimizer holds and moves for each parameter it trains, for the estimates. No torch.

The rehearsal does not read this: it runs the optimizer.
"""

from dataclasses import dataclass

from brim.errors import RecipeError
from brim.recipe import Optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class StateCost:
    state_copies: int
    """Tensors of the parameter's size that live from step to step, in the format of what is updated."""
    step_passes: int
    """Times that a step reads or writes a tensor of that size, gradients aside."""
    temporaries: int
    """Tensors of one parameter's size that exist while it is stepped."""
    own_bytes: float = 0.0
    """Of states in a format of their own, an element."""
    in_parts: bool = False
    """A CPU steps parameters in parts (`layers.blockwise_adam`), each with FP32 temporaries."""

    def state_bytes(self, elements: int, element_bytes: int) -> int:
        """Of the states of so many elements; `element_bytes`: of what is updated."""
        return int(elements * (self.state_copies * element_bytes + self.own_bytes))

    def temporary_bytes(self, elements: int, element_bytes: int) -> int:
        """While a parameter of so many elements is stepped."""
        whole = self.temporaries * element_bytes * elements
        if not self.in_parts:
            return whole
        # moments, cells and codes
        return whole + 16 * min(elements, max(2**18, elements // 16))


_COSTS = {
    # reads and writes weight and two moments, in one kernel
    "adamw": StateCost(state_copies=2, step_passes=6, temporaries=0),
    # momentum: scaled and added to, two kernels; weight: one; decay is added to a copy of the gradient
    "sgd": StateCost(state_copies=1, step_passes=6, temporaries=1),
    # direction: interpolated, its sign taken, applied; momentum: one interpolation
    "lion": StateCost(state_copies=1, step_passes=8, temporaries=1),
    # a row and a column beside a matrix are nothing; the update is made in five kernels and its norm taken
    "adafactor": StateCost(state_copies=0, step_passes=12, temporaries=1),
    # two codes, and two FP32 scales for 256; decoded, updated and encoded in about twenty kernels
    "adamw8bit": StateCost(state_copies=0, own_bytes=2 + 8 / 256, step_passes=20, temporaries=0, in_parts=True),
}


def state_cost(optimizer: Optimizer) -> StateCost:
    """The row of this optimizer. Raises RecipeError for one without a row."""
    if optimizer.name not in _COSTS:
        raise RecipeError(f"optimizer.name = {optimizer.name!r} has no cost; known: {', '.join(_COSTS)}")
    return _COSTS[optimizer.name]
