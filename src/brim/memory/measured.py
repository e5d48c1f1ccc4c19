"""Meters of real runs, independent of the rehearsal's: what the allocator itself says.

On a CPU: the allocation events of PyTorch's profiler (`experimental_event_tree`), which also see inside operators.
Measured cost on two cores: about 4 % of a training step. On CUDA: the caching allocator's own counters.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from brim.memory import owners
from brim.memory.lifetimes import storage_of
from brim.memory.trace import Block, Trace
from brim.report import Ledger, Peak

_MARK = "brim:"


class RealMeter(Protocol):
    """Measures allocated bytes of everything that runs inside `with meter:`."""

    name: str

    def __enter__(self) -> "RealMeter": ...
    def __exit__(self, *exception: object) -> None: ...

    def sample(self) -> tuple[int, int]:
        """(allocated bytes now, highest since the last sample)."""

    def start_over(self) -> None:
        """Forget the peak so far; what is allocated now counts on."""

    @property
    def peak(self) -> Peak:
        """Of everything from the start, or `start_over`, up to the last sample."""

    @property
    def ledger(self) -> Ledger:
        """By owner at the peak; all zero where the meter cannot tell."""


def meter_for(device: torch.device) -> RealMeter:
    return CudaMeter(device) if device.type == "cuda" else CpuMeter()


class CpuMeter:
    """Adds up the allocation events of the profiler, one recording after another without a gap between steps."""

    name = "allocation events of PyTorch's profiler, every step"

    def __init__(self) -> None:
        self._trace = Trace()
        self._live: dict[int, Block] = {}
        self._line = "workspace"
        self._claims: list[tuple[str, set[int]]] = []
        self._peak = Peak(allocated_bytes=0)
        self._ledger = Ledger()
        self._recording: profile | None = None
        self._listening: Any = None

    def __enter__(self) -> "CpuMeter":
        self._listening = owners.listening(self)
        self._listening.__enter__()
        self._record()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listening.__exit__(None, None, None)
        # None when a signal ended the run between two recordings.
        if self._recording is not None:
            self._replay()

    def switch(self, line: str) -> None:
        with record_function(f"{_MARK}switch:{line}"):
            pass

    def claim(self, line: str, tensors: Iterable[Tensor]) -> None:
        with record_function(f"{_MARK}claim:{len(self._claims)}"):
            pass
        self._claims.append((line, {storage_of(tensor).data_ptr() for tensor in tensors}))

    def place(self, *, on_host: bool) -> None:
        """The same memory."""

    def rest(self) -> None:
        """The recording of many micro-batches would take more memory than their tensors."""
        if self._recording is not None:
            self._replay()
            self._record()

    def sample(self) -> tuple[int, int]:
        self._replay()
        now, highest = self._trace.live_bytes, self._trace.peak_bytes
        self._trace.forget_past()
        self._record()
        return now, highest

    def start_over(self) -> None:
        self.sample()
        self._peak = Peak(allocated_bytes=self._trace.peak_bytes)
        self._ledger = self._trace.peak_ledger()

    @property
    def peak(self) -> Peak:
        return self._peak

    @property
    def ledger(self) -> Ledger:
        return self._ledger

    def _record(self) -> None:
        self._claims.clear()
        self._recording = _recorder()
        self._recording.__enter__()

    def _replay(self) -> None:
        assert self._recording is not None
        recording, self._recording = self._recording, None
        recording.__exit__(None, None, None)
        for _, kind, event in sorted(_events(recording), key=lambda timed: timed[0]):
            if kind == "mark":
                self._obey(event)
            else:
                self._count(event.ptr, event.alloc_size)
        if self._trace.peak_bytes > self._peak.allocated_bytes:
            self._peak = Peak(allocated_bytes=self._trace.peak_bytes)
            self._ledger = self._trace.peak_ledger()

    def _obey(self, mark: str) -> None:
        action, _, value = mark.removeprefix(_MARK).partition(":")
        if action == "switch":
            self._line = value
            return
        line, pointers = self._claims[int(value)]
        for pointer in pointers & self._live.keys():
            self._live[pointer].line = line

    def _count(self, pointer: int, nbytes: int) -> None:
        # A free that fell between two recordings shows when its address is given out again.
        if (block := self._live.pop(pointer, None)) is not None:
            self._trace.free(block)
        if nbytes > 0:
            self._live[pointer] = self._trace.allocate(nbytes, self._line)


def _recorder() -> profile:
    # Kineto writes a line to stderr at each start and stop; read at its first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _events(recording: profile) -> Iterator[tuple[int, str, Any]]:
    """(time in ns, "memory" or "mark", the event's fields or the mark's text) of one recording, in no order."""
    assert recording.profiler is not None and recording.profiler.kineto_results is not None
    unread = list(recording.profiler.kineto_results.experimental_event_tree())
    while unread:
        event = unread.pop()
        unread.extend(event.children)
        if event.name == "[memory]":
            yield event.start_time_ns, "memory", event.extra_fields
        elif event.name.startswith(_MARK):
            yield event.start_time_ns, "mark", event.name


def highest_bytes(work: Callable[[], object]) -> int:
    """The most that `work` has allocated at any moment, in bytes."""
    with _recorder() as recording:
        work()
    live = highest = 0
    for _, kind, event in sorted(_events(recording), key=lambda timed: timed[0]):
        if kind == "memory":
            live += event.alloc_size
            highest = max(highest, live)
    return highest


class CudaMeter:
    """The caching allocator's counters, and what the driver says the device has in use."""

    name = "counters of the CUDA caching allocator"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak = Peak(allocated_bytes=0)
        self.ledger = Ledger()

    def __enter__(self) -> "CudaMeter":
        torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *exception: object) -> None:
        self.sample()

    def sample(self) -> tuple[int, int]:
        highest = torch.cuda.max_memory_allocated(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        self._peak = Peak(
            allocated_bytes=max(highest, self._peak.allocated_bytes),
            reserved_bytes=max(torch.cuda.max_memory_reserved(self._device), self._peak.reserved_bytes or 0),
            device_bytes=max(total - free, self._peak.device_bytes or 0),
        )
        now = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return now, highest

    def start_over(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._peak = Peak(allocated_bytes=0)

    @property
    def peak(self) -> Peak:
        return self._peak
