"""Meter of tensor lifetimes: sees each operator's outputs, counts each new storage until it is collected.

It sees sizes only, so it works on fake tensors; what an operator allocates and frees inside itself, it must be told.
A sharded tensor counts as the part of it that is here. A storage that is resized (FSDP frees a gathered parameter so)
is a block that ends and another that begins.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brim.memory.trace import Block, Trace


class PlainMode(TorchDispatchMode):
    """A dispatch mode that is never compiled: without the wrapper that keeps torch.compile out, it costs half."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class OperatorListener(Protocol):
    """Told each of the device's operators, its arguments and its result after it ran."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None: ...

    def apart(self) -> AbstractContextManager[object]:
        """What it is told inside the block, beside what it was told before."""

    def add(self, work: object) -> None:
        """The same as in such a block once more."""

    def on_host(self, func: Any) -> None:
        """Of an operator of the host's, which the device waits for."""


class LifetimeMeter(PlainMode):
    """Counts the bytes of every storage born inside the `with` block, by owner."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.before: Callable[[Any], None] | None = None
        """Told each operator before it runs; None: nobody asks."""
        self.after: OperatorListener | None = None
        """None: nobody asks."""
        self.inside: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], int] | None = None
        """Says how much more than its outputs an operator needs while it runs; None: nothing."""
        self.working: Callable[[], str] | None = None
        """Names the module that works now; None: nobody asks."""
        self._on_host = False
        self._line = "workspace"
        self._streams = [torch.cpu.current_stream()]
        self._blocks: dict[int, Block] = {}
        self._watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if is_sharded(types):
            return NotImplemented  # it calls operators on its part, which are what allocates
        if self.before is not None:
            self.before(func)
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.see(out)
        else:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.see(leaf)
        if (
            self.inside is not None
            and self._place is self.trace
            and (nbytes := self.inside(func, args, kwargs or {}, out))
        ):
            self.trace.free(self.trace.allocate(nbytes, self._line))
        if self.after is not None and self._place is self.trace:
            self.after(func, args, kwargs or {}, out)
        elif self.after is not None:
            self.after.on_host(func)
        return out

    def switch(self, line: str) -> None:
        self._line = line

    def claim(self, line: str, tensors: Iterable[Tensor]) -> None:
        """Put these tensors on a line; one that the meter has not met counts from now on."""
        for tensor in tensors:
            self.see(tensor)
            self._blocks[_key(storage_of(tensor))].line = line

    def rest(self) -> None:
        """Everything is added up as it comes."""

    def place(self, *, on_host: bool) -> None:
        self._on_host = on_host

    @property
    def _place(self) -> Trace:
        """Where what is allocated now is counted."""
        return self.trace.host if self._on_host and self.trace.host is not None else self.trace

    @property
    def state(self) -> tuple[str, bool, bool]:
        """What decides where an operator's memory is counted, and who hears of it."""
        return self._line, self._on_host, self.after is None

    def block_of(self, tensor: Tensor) -> Block | None:
        """Of the tensor's storage; None: the meter has not met it."""
        return self._blocks.get(_key(storage_of(tensor)))

    def allocate(self, nbytes: int, line: str) -> Block:
        """A block in the device's memory that no tensor stands for."""
        block = self.trace.allocate(nbytes, line, self.stream)
        if self.working is not None:
            block.module = self.working()
        return block

    @property
    def stream(self) -> int:
        """The stream that works now, counted as they come: a CPU's are names, which sharding's engine keeps apart."""
        now = torch.cpu.current_stream()
        if now not in self._streams:
            self._streams.append(now)
        return self._streams.index(now)

    def see(self, tensor: Tensor) -> None:
        """Count this tensor's storage from now on, if it is new and is somewhere."""
        if tensor.device.type == "meta":
            return
        storage = storage_of(tensor)
        key = _key(storage)
        if key in self._blocks:
            return
        trace = self._place
        self._blocks[key] = block = trace.allocate(storage.nbytes(), self._line, self.stream)
        if self.working is not None:
            block.module = self.working()
        self._watches[key] = weakref.ref(storage, lambda _: self._forget(key, trace))

    def tag(self, tensor: Tensor, module: str) -> None:
        """This tensor's storage is the module's; one that the meter has not met is nobody's."""
        block = self._blocks.get(_key(storage_of(tensor)))
        if block is not None:
            block.module = module

    def resized(self, storage: torch.UntypedStorage) -> None:
        """This storage has another size now; its owner stays."""
        key = _key(storage)
        if key in self._blocks:
            before = self._blocks[key]
            self.trace.free(before)
            self._blocks[key] = block = self.trace.allocate(storage.nbytes(), before.line, self.stream)
            block.module = before.module

    def stop(self) -> None:
        """What lives now lives to the end of the trace: the end of a program is no part of its step."""
        self._watches.clear()

    def _forget(self, key: int, trace: Trace) -> None:
        del self._watches[key]
        trace.free(self._blocks.pop(key))


def is_sharded(types: Iterable[type]) -> bool:
    """Whether an operator is asked of a tensor that stands for parts on many ranks, or that is on its way."""
    return any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types)


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """The storage that a tensor has here; of a sharded one, its part's."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.elem
    return tensor.untyped_storage()


def _key(storage: torch.UntypedStorage) -> int:
    """Identity of the storage behind its Python wrapper; unique as long as the storage lives."""
    return storage._cdata
