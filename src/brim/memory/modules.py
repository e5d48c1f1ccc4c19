"""Which module every byte of a moment belongs to: the rehearsal's blocks tagged as they are made, and folded.

Parameters, their gradients and their optimizer states belong to the module that has the parameter; what forward makes
belongs to the innermost module that runs, also where backward runs it again. What backward itself makes flows from
module to module and has a row of its own, as has what no module makes. The ledger's lines stay as they are.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from brim.memory.lifetimes import LifetimeMeter
from brim.memory.trace import Trace, line_of
from brim.report import LEDGER_LINES, Ledger, ModuleRow

BACKWARD = "(backward)"
"""Gradients on their way, and what an operator's backward takes."""
ELSEWHERE = "(step)"
"""Made by the loss, the optimizer or the batch, outside of all modules."""
DEVICE = "(device)"
"""The runtime's and the allocator's own."""

_NUMBER = re.compile(r"\d+")


class ModuleWatch:
    """Says which module works, and tags the blocks of a model's parameters, gradients and states."""

    def __init__(self, meter: LifetimeMeter, model: nn.Module) -> None:
        self._meter = meter
        self._model = model
        self._names = {module: name for name, module in model.named_modules() if name}
        self._running: list[str] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Tag what is allocated until the block ends.

        The call of every module is wrapped: hooks on backward would add views to what is rehearsed.
        """
        call = nn.Module.__call__

        def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = self._names.get(module)
            if name is None:
                return call(module, *args, **kwargs)
            self._running.append(name)
            try:
                return call(module, *args, **kwargs)
            finally:
                self._running.pop()

        self._meter.working = self._working
        try:
            with mock.patch.object(nn.Module, "__call__", watched):
                yield
        finally:
            self._meter.working = None

    def switch(self, line: str) -> None:
        """The line does not say which module works."""

    def claim(self, line: str, tensors: Iterable[Tensor]) -> None:
        """Gradients are claimed before they are freed: the last time that they can be told."""
        if line == "gradients":
            claimed = {id(tensor) for tensor in tensors}
            for name, parameter in self._model.named_parameters():
                if parameter.grad is not None and id(parameter.grad) in claimed:
                    self._meter.tag(parameter.grad, _owner(name))

    def rest(self) -> None:
        """Everything is added up as it comes."""

    def place(self, *, on_host: bool) -> None:
        """Modules own what is in the host's memory, too."""

    def tag_lasting(self, states: Callable[[Tensor], Iterable[Tensor]]) -> None:
        """Parameters and buffers, and what the optimizer keeps for each parameter: they live from step to step."""
        for name, tensor in (*self._model.named_buffers(), *self._model.named_parameters()):
            self._meter.tag(tensor, _owner(name))
            for state in states(tensor):
                self._meter.tag(state, _owner(name))

    def _working(self) -> str:
        if self._running:
            return self._running[-1]
        return BACKWARD if torch._C._current_graph_task_id() != -1 else ELSEWHERE


def rows_at(trace: Trace, index: int, whole: Ledger) -> tuple[ModuleRow, ...]:
    """Bytes by module after the first `index` events, equal neighbours among numbered layers folded, largest first.

    Together they are `whole`, the ledger of that moment: what it has beyond the trace is the device's.
    """
    lines = {DEVICE: dict.fromkeys(LEDGER_LINES, 0)}
    for allocated, block in trace.events[:index]:
        row = lines.setdefault(block.module or ELSEWHERE, dict.fromkeys(LEDGER_LINES, 0))
        row[line_of(block.line)] += block.nbytes if allocated else -block.nbytes
    seen = trace.ledger_at(index)
    lines[DEVICE] = {line: nbytes - getattr(seen, line) for line, nbytes in whole.to_dict().items()}
    ledgers = {module: Ledger(**row) for module, row in lines.items()}
    return tuple(sorted(_folded(ledgers), key=lambda row: -row.ledger.total))


def _folded(ledgers: Mapping[str, Ledger]) -> Iterator[ModuleRow]:
    """One row for modules of one name but for a number, the numbers in a row, that hold the same bytes each."""
    held = {module: ledger for module, ledger in ledgers.items() if any(ledger.to_dict().values())}
    for _, group in groupby(sorted(held, key=_place), key=lambda module: (_pattern(module), held[module])):
        modules = list(group)
        yield from _stretches(modules, held[modules[0]])


def _stretches(modules: list[str], ledger: Ledger) -> Iterator[ModuleRow]:
    """Sorted modules of one pattern and equal bytes, cut where a number is missing."""
    start = 0
    for end in range(1, len(modules) + 1):
        if end == len(modules) or not _follows(modules[end - 1], modules[end]):
            each = modules[start:end]
            total = Ledger(**{line: len(each) * nbytes for line, nbytes in ledger.to_dict().items()})
            yield ModuleRow(module=_name(each[0], each[-1]), count=len(each), ledger=total)
            start = end


def _follows(before: str, after: str) -> bool:
    """Whether the first number goes up by one and no other changes."""
    ours, theirs = _NUMBER.findall(before), _NUMBER.findall(after)
    return bool(ours) and int(theirs[0]) == int(ours[0]) + 1 and ours[1:] == theirs[1:]


def _name(first: str, last: str) -> str:
    if first == last:
        return first
    return _NUMBER.sub(lambda number: f"{number[0]}-{_NUMBER.findall(last)[0]}", first, count=1)


def _pattern(module: str) -> str:
    return _NUMBER.sub("#", module, count=1)


def _place(module: str) -> tuple[str, int]:
    number = _NUMBER.search(module)
    return _pattern(module), int(number[0]) if number else -1


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0] or ELSEWHERE
