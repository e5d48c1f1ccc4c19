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
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        key = (name, tuple(shape), dtype)
        if key not in self._views:
            nbytes = prod(shape) * dtype.itemsize
            if name not in self._held or self._held[name].numel() < nbytes:
                self._held[name] = torch.empty(nbytes, dtype=torch.uint8)
                self._views = {view: tensor for view, tensor in self._views.items() if view[0] != name}
            self._views[key] = self._held[name][:nbytes].view(dtype).view(key[1])
        return self._views[key]
