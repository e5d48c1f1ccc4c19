"""What a rehearsed step asks an accelerator for, kernel by kernel, and who asks.

Each operator is a kernel that reads its inputs and writes its outputs once; a function that stands for one kernel
(`one_kernel`) reads what was there before it, and writes what it gives back. Views are counted, too: they take the
host's time and none of the device's.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from brim.hardware.operator_rates import Format

Launcher = Literal["python", "autograd", "host"]
"""Code of the model or the optimizer; the autograd engine; such code, of an operator that the host runs itself."""


class Kernel(NamedTuple):
    operator: str
    launcher: Launcher
    number_format: Format
    """Of its products; "bf16" where it has none."""
    flops: float
    """Of its products."""
    moved_bytes: int
    """Read and written; 0: a view, or nothing of the device's."""


class KernelMeter:
    """Counts kernels of each kind and size."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget what was counted."""
        self.counts: dict[Kernel, float] = defaultdict(float)
        self._inside: _Inside | None = None

    def launch(
        self,
        operator: str,
        read: Iterable[object],
        written: Iterable[Tensor],
        *,
        number_format: Format = "bf16",
        flops: float = 0.0,
    ) -> None:
        """One operator; no tensors: a view."""
        inputs, outputs = [leaf for leaf in read if isinstance(leaf, Tensor)], list(written)
        if self._inside is not None:
            self._inside.add(inputs, outputs, flops)
        else:
            self._count(operator, number_format, flops, sum(map(_touched_bytes, (*inputs, *outputs))))

    def run_on_host(self, operator: str) -> None:
        """An operator that the host runs itself: Python asks for it as for the device's, which it does not use."""
        self.counts[Kernel(operator, "host", "fp32", 0.0, 0)] += 1

    def begin_kernel(self, given: object) -> None:
        """Operators from now on are one kernel, which reads what it is given."""
        self._inside = _Inside()
        self._inside.add((leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)), (), 0.0)

    def end_kernel(self, name: str, result: object) -> None:
        inside, self._inside = self._inside, None
        if inside is not None:
            self._count(name, "bf16", inside.flops, inside.moved_bytes(result))

    def drop_kernel(self) -> None:
        """It was none of the device's work."""
        self._inside = None

    def _count(self, operator: str, number_format: Format, flops: float, moved_bytes: int) -> None:
        # what a checkpoint runs again inside backward is asked for by Python, which records it then
        engine = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        launcher: Launcher = "autograd" if engine else "python"
        self.counts[Kernel(operator, launcher, number_format, flops, moved_bytes)] += 1


class _Inside:
    """Operators that one kernel does: what they make and do not give back stays on the chip."""

    def __init__(self) -> None:
        self.flops = 0.0
        self._read: dict[int, int] = {}
        self._made: set[int] = set()

    def add(self, read: Iterable[Tensor], written: Iterable[Tensor], flops: float) -> None:
        self.flops += flops
        for tensor in read:
            if (key := _storage(tensor)) not in self._made:
                self._read[key] = max(_touched_bytes(tensor), self._read.get(key, 0))
        self._made |= {_storage(tensor) for tensor in written}

    def moved_bytes(self, given_back: object) -> int:
        outputs = (leaf for leaf in tree_leaves(given_back) if isinstance(leaf, Tensor))
        return sum(self._read.values()) + sum(map(_touched_bytes, outputs))


def _touched_bytes(tensor: Tensor) -> int:
    """What is repeated along a dimension taken once."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sides if stride or not size) * tensor.itemsize


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
