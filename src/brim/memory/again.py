"""Pieces of a step that are run many times over: two are run, the others leave the same events without being run.

A chunk of the loss, or the unpacking of a weight, allocates and frees what the one before it did. On fake tensors each
operator costs a tenth of a millisecond, so of each piece the first two runs with arguments of the same shapes and
settings are recorded; where they agree, later ones are told to the meters and not run. It must be a piece that makes
nothing which outlives it but its result, a new tensor, or none: what else happens (a first gradient that stays, memory
of the host, a second stream) is seen in the record, and such a run is not repeated.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from brim.memory.lifetimes import LifetimeMeter, is_sharded, storage_of
from brim.memory.trace import Block

_CHECKPOINTS = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
"""In forward, and when it is run again."""
_Event = tuple[bool, int, int, str]
"""Allocated or freed, which block of the piece, bytes, line."""
_Made = tuple[int, torch.Size, tuple[int, ...], torch.dtype]
"""Which block of the piece the result is, and what is needed to make it."""


@dataclass(frozen=True, slots=True)
class _Record:
    events: tuple[_Event, ...]
    made: _Made | None
    """None: nothing is returned."""
    work: object
    """Of the operators, for the meter that counts it."""


class Again:
    """What pieces did under this meter."""

    def __init__(self, meter: LifetimeMeter) -> None:
        self._meter = meter
        self._first: dict[Hashable, _Record] = {}
        self._sure: dict[Hashable, _Record] = {}

    def of(self, piece: Callable[..., Any]) -> Callable[..., Any]:
        """The piece, run twice for arguments of a kind."""

        @wraps(piece)
        def repeated(*args: Any) -> Any:
            if _counts_operators():
                return piece(*args)
            try:
                backward = torch._C._current_graph_task_id() != -1  # autograd's engine launches what it runs
                key = (piece, self._meter.state, torch.is_grad_enabled(), backward, _kind(args))
                hash(key)
            except TypeError:
                return piece(*args)
            if (record := self._sure.get(key)) is not None:
                return self._repeat(record)
            return self._run(piece, args, key)

        return repeated

    def _run(self, piece: Callable[..., Any], args: tuple[Any, ...], key: Hashable) -> Any:
        meter, after = self._meter, self._meter.after
        start, on_host = len(meter.trace.events), _host_events(meter)
        with nullcontext() if after is None else after.apart() as work:
            result = piece(*args)
        record = None
        if _host_events(meter) == on_host:
            record = _recorded(meter.trace.events[start:], result, meter, work)
        if record is not None and self._first.get(key) == record:
            self._sure[key] = record
        elif record is not None:
            self._first[key] = record
        return result

    def _repeat(self, record: _Record) -> Tensor | None:
        meter, result = self._meter, None
        blocks: dict[int, Block] = {}
        for allocated, number, nbytes, line in record.events:
            if record.made is not None and number == record.made[0]:
                _, shape, stride, dtype = record.made
                result = torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
            elif allocated:
                blocks[number] = meter.allocate(nbytes, line)
            else:
                meter.trace.free(blocks.pop(number))
        if meter.after is not None:
            meter.after.add(record.work)
        return result


def _recorded(
    happened: Iterable[tuple[bool, Block]], result: Any, meter: LifetimeMeter, work: object
) -> _Record | None:
    """None where what happened cannot be repeated without running it."""
    numbers: dict[int, int] = {}
    alive: dict[int, Block] = {}
    events: list[_Event] = []
    for allocated, block in happened:
        if allocated:
            numbers[id(block)] = len(numbers)
            alive[id(block)] = block
        elif alive.pop(id(block), None) is None:
            return None  # it was there before
        if block.stream != meter.stream:
            return None
        events.append((allocated, numbers[id(block)], block.nbytes, block.line))
    if result is None:
        return None if alive else _Record(tuple(events), None, work)
    if not isinstance(result, FakeTensor) or result.requires_grad or len(alive) != 1:
        return None
    (block,) = alive.values()
    made = (numbers[id(block)], result.shape, result.stride(), result.dtype)
    is_whole = storage_of(result).nbytes() == block.nbytes == result.numel() * result.itemsize
    is_its_own = meter.block_of(result) is block and block.line == meter.state[0]
    return _Record(tuple(events), made, work) if is_whole and is_its_own else None


def _counts_operators() -> bool:
    """Whether a selective checkpoint is at work: it keeps results by their number, so that none may lack."""
    return any(isinstance(mode, _CHECKPOINTS) for mode in _get_current_dispatch_mode_stack())


def _host_events(meter: LifetimeMeter) -> int:
    return 0 if meter.trace.host is None else len(meter.trace.host.events)


def _kind(value: Any) -> Hashable:
    """What of an argument decides what is done with it. Raises TypeError where that is unknown."""
    if isinstance(value, Tensor):
        if is_sharded([type(value)]) or not isinstance(value, FakeTensor):
            raise TypeError
        if value.requires_grad and torch.is_grad_enabled():
            raise TypeError  # what is done with it is kept for backward
        return value.shape, value.stride(), value.dtype, value.requires_grad
    if isinstance(value, nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        return value, *((_kind(tensor.detach()), tensor.requires_grad, tensor.grad is None) for tensor in tensors)
    if isinstance(value, partial):
        return value.func, _kind(value.args), _kind(value.keywords)
    if isinstance(value, tuple | list):
        return type(value), *map(_kind, value)
    if isinstance(value, Mapping):
        return tuple((key, _kind(one)) for key, one in value.items())
    if isinstance(value, slice):
        return slice, value.stop - value.start  # where it is changes no size
    hash(value)
    return type(value), value
