"""Memory that a worker uses again for each block."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class Scratch:
    """Tensors by name, in memory that is kept: fresh memory is mapped and cleared page by page, again for each block.

    A tensor of some name is good until the same name is taken again. Of one thread.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        nbytes = prod(shape) * dtype.itemsize
        held = self._held.get(name)
        if held is None or held.numel() < nbytes:
            held = self._held[name] = torch.empty(nbytes, dtype=torch.uint8)
        return held[:nbytes].view(dtype).view(tuple(shape))
