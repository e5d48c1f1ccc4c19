"""What waits in the host's memory and crosses to the device when it is needed: what blocks keep for backward, and the
weights of blocks.

Kept: autograd hands over each tensor that a block keeps (torch.autograd.graph.saved_tensors_hooks). Its storage is
copied to the host, once however many hold it, and what backward asks for is copied back as it was laid out. On a GPU
the copies are pinned and leave on a stream of their own: one is on its way while the next operators run, and stays on
the device until the next one leaves.

Weights: a block's parameters and buffers lie on the host for good. Its forward begins by fetching them and ends by
letting go; backward fetches each again when it asks for it. The gradient of a fetched weight crosses to the host, where
the optimizer steps it.

How this differs from `torch.autograd.graph.save_on_cpu`: that copies what has been copied already (a layer's input,
once for each matrix that reads it) and weights that never leave, and waits for each.

Under checkpointing a block keeps its input; what it makes again in backward stays on the device until it is used.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from brim.errors import RecipeError
from brim.memory import owners
from brim.recipe import Memory

_LEAST_BYTES = 1024
"""What is smaller stays: it would cost a copy's start and save nothing."""

_Around = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class _Away:
    """A tensor, by its place in a storage that has a copy on the host."""

    home: Tensor
    """The whole storage, its elements in a row."""
    line: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @property
    def span(self) -> Tensor:
        """The part of the storage that the tensor reaches."""
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        return self.home[self.offset : self.offset + last + 1]


@dataclass(frozen=True, slots=True)
class _Known:
    """A storage on the device that has a copy on the host."""

    storage: weakref.ref[torch.UntypedStorage]
    version: int
    """Of its tensors, when it was copied: one that was written to since is another."""
    home: weakref.ref[Tensor]
    line: str


class Crossing:
    """The way between one device and its host."""

    def __init__(self, device: torch.device, *, keeps: bool) -> None:
        self._device = device
        self._keeps = keeps
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: Tensor | None = None
        self._known: dict[int, _Known] = {}

    def pack(self, tensor: Tensor, staying: frozenset[int]) -> Tensor | _Away:
        """What autograd keeps in the tensor's place."""
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is None or known.version != tensor._version:
            stays = not self._keeps or storage._cdata in staying or storage.nbytes() < _LEAST_BYTES
            if stays or tensor.numel() == 0:
                return tensor
            home, line = self._send(_in_a_row(tensor)), "activations"
            self._remember(tensor, home, line)
        else:
            there, line = known.home(), known.line
            assert there is not None
            home = there
        return _Away(home, line, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Tensor | _Away) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._arrive()
        return self.bring(packed.span, packed.line).as_strided(packed.size, packed.stride)

    def _remember(self, tensor: Tensor, home: Tensor, line: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        gone = weakref.ref(storage, lambda _: self._known.pop(key, None))
        self._known[key] = _Known(gone, tensor._version, weakref.ref(home), line)

    def _send(self, here: Tensor) -> Tensor:
        """A copy on the host; `here` stays until the next one leaves."""
        with torch.no_grad(), owners.on_host():
            there = torch.empty_like(here, device="cpu", pin_memory=self._stream is not None)
            self._arrive()
            if self._stream is None:
                there.copy_(here)
            else:
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(self._stream):
                    there.copy_(here, non_blocking=True)
        self._leaving = here
        return there

    def _arrive(self) -> None:
        """What left last is on the host from here on, and need not be on the device."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._leaving = None

    def bring(self, there: Tensor, line: str) -> Tensor:
        """A copy on the device."""
        with torch.no_grad(), owners.on_device(), owners.inside(line):
            return torch.empty_like(there, device=self._device).copy_(there, non_blocking=True)

    def fetch(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A weight on the device, and its elements in a row on the host: to be held as long as the weight is."""
        home = weight.detach().view(-1)
        fetched = self._fetch(weight)
        self._remember(fetched, home, "gathered")
        return fetched, home

    def _fetch(self, weight: Tensor) -> Tensor:
        if not weight.requires_grad:
            return self.bring(weight, "gathered")
        fetched: Tensor = _Fetch.apply(weight, self)  # type: ignore[no-untyped-call]
        return fetched

    def pinned(self, weight: Tensor) -> Tensor:
        """Where the host's memory is to be read by a GPU."""
        return weight if self._stream is None else weight.pin_memory()


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, crossing: Crossing) -> Tensor:
        return crossing.bring(weight, "gathered")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (here,) = gradients
        with owners.on_host():
            # waits for the copy: the optimizer reads it on the host
            return torch.empty(here.shape, dtype=here.dtype, device="cpu").copy_(here), None


def offload_blocks(
    base: PreTrainedModel, memory: Memory, device: torch.device, *, gathered: bool
) -> list[nn.Parameter]:
    """Move what the recipe says to the host; returns the parameters that are there for good. After checkpointing.

    Where weights are offloaded, the whole model is on the host, and what is outside of blocks is brought to the device.
    `gathered`: weights are gathered from ranks when they are needed, and who gathers them fetches them, too.
    """
    if not (memory.offloads_weights or memory.offloads_activations):
        return []
    crossing, blocks = Crossing(device, keeps=memory.offloads_activations), _blocks(base)
    if gathered or not memory.offloads_weights:
        for block in blocks if memory.offloads_activations else ():
            _surround(block, _keeping(crossing, block))
        return []
    for block in blocks:
        fetching, keeping = _fetching(crossing, block), _keeping(crossing, None)
        if block.gradient_checkpointing:
            _surround_again(block, fetching)
            _surround(block, keeping)
        else:
            _surround(block, keeping, fetching)
    return _settle(base, blocks, crossing)


def _settle(base: PreTrainedModel, blocks: Sequence[nn.Module], crossing: Crossing) -> list[nn.Parameter]:
    at_home = {id(tensor): tensor for block in blocks for tensor in chain(block.parameters(), block.buffers())}
    for tensor in chain(base.parameters(), base.buffers()):
        if id(tensor) in at_home:
            tensor.data = crossing.pinned(tensor.data)
        else:
            tensor.data = crossing.bring(tensor.data, "weights")
    return [tensor for tensor in at_home.values() if isinstance(tensor, nn.Parameter)]


def _blocks(base: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    found = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise RecipeError(
            f"{type(base).__name__} has no blocks that transformers knows of, and they are what is offloaded; "
            'nearest: memory.offload = "optimizer"'
        )
    return found


def _keeping(crossing: Crossing, resident: nn.Module | None) -> _Around:
    """Around a block's forward; the weights of `resident` are on the device anyway."""

    def around() -> AbstractContextManager[object]:
        weights = () if resident is None else chain(resident.parameters(), resident.buffers())
        staying = frozenset(weight.untyped_storage()._cdata for weight in weights)
        return saved_tensors_hooks(lambda tensor: crossing.pack(tensor, staying), crossing.unpack)

    return around


def _fetching(crossing: Crossing, block: nn.Module) -> _Around:
    @contextmanager
    def around() -> Iterator[None]:
        tables: list[dict[str, Any]] = [
            table for module in block.modules() for table in (module._parameters, module._buffers)
        ]
        at_home = [(table, name, weight) for table in tables for name, weight in table.items() if weight is not None]
        fetched = {id(weight): crossing.fetch(weight) for *_, weight in at_home}
        for table, name, weight in at_home:
            table[name] = fetched[id(weight)][0]
        try:
            yield
        finally:
            for table, name, weight in at_home:
                table[name] = weight

    return around


def _surround(block: nn.Module, *arounds: _Around) -> None:
    """Each call of the block's forward is inside of these."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        run = type(block).forward  # looked up now: sharding gives the block another class
        if len(arounds) == 1:
            with arounds[0]():
                return run(block, *args, **kwargs)
        with arounds[0](), arounds[1]():
            return run(block, *args, **kwargs)

    block.forward = forward


def _surround_again(block: GradientCheckpointingLayer, around: _Around) -> None:
    """So is what a checkpointed block runs, both times."""
    checkpoint = block._gradient_checkpointing_func

    def surrounded(run: Callable[..., Any], *args: Any) -> Any:
        def inside(*args: Any) -> Any:
            with around():
                return run(*args)

        return checkpoint(inside, *args)

    block._gradient_checkpointing_func = surrounded


def _in_a_row(tensor: Tensor) -> Tensor:
    """All elements of its storage."""
    tensor = tensor.detach()
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
