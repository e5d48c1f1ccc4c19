"""Who owns the next tensor: the training step says on which ledger line it works, a meter listens.

Without a listener both calls cost next to nothing, so the step that is rehearsed is the step that trains.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor


class Listener(Protocol):
    """A meter that wants to know who owns what."""

    def switch(self, line: str) -> None:
        """Storage allocated from now on belongs on this ledger line."""

    def claim(self, line: str, tensors: Iterable[Tensor]) -> None:
        """These tensors' storages belong on this line, whenever they were allocated."""

    def place(self, *, on_host: bool) -> None:
        """Storage allocated from now on is in the host's memory, or in the device's again."""

    def rest(self) -> None:
        """No operator runs now."""


_listeners: list[Listener] = []
_working_on = "workspace"
"""The line of the last switch."""
_is_on_host = False


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell this listener, too, until the block ends."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def switch(line: str) -> None:
    """Storage allocated from now on belongs on this ledger line."""
    global _working_on
    _working_on = line
    for listener in _listeners:
        listener.switch(line)


@contextmanager
def inside(line: str) -> Iterator[None]:
    """Storage allocated inside the block belongs on this line; after it, on the line before."""
    before = _working_on
    switch(line)
    try:
        yield
    finally:
        switch(before)


def claim(line: str, tensors: Iterable[Tensor]) -> None:
    """These tensors' storages belong on this line, whenever they were allocated."""
    if _listeners:
        owned = list(tensors)
        for listener in _listeners:
            listener.claim(line, owned)


def rest() -> None:
    """Between micro-batches: a meter may add up what it has recorded."""
    for listener in _listeners:
        listener.rest()


@contextmanager
def on_host() -> Iterator[None]:
    """What is allocated inside the block is in the host's memory; on a CPU that is the device's."""
    before = _is_on_host
    _place(on_host=True)
    try:
        yield
    finally:
        _place(on_host=before)


@contextmanager
def on_device() -> Iterator[None]:
    """What is allocated inside the block is in the device's memory, whatever is around it."""
    before = _is_on_host
    _place(on_host=False)
    try:
        yield
    finally:
        _place(on_host=before)


def _place(*, on_host: bool) -> None:
    global _is_on_host
    _is_on_host = on_host
    for listener in _listeners:
        listener.place(on_host=on_host)
