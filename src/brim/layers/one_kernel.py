"""Functions that stand for one kernel: written in operators, which a meter of kernels takes together. No torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


class Listener(Protocol):
    """Counts kernels."""

    def begin_kernel(self, given: object) -> None:
        """Operators from now on are one, which reads what it is given."""

    def end_kernel(self, name: str, result: object) -> None:
        """What it gave back; all else that it made stayed on the chip."""

    def drop_kernel(self) -> None:
        """It was none of the device's work."""


_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def one_kernel(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """The same function, of which listeners hear where it begins and ends."""

    @wraps(function)
    def together(*given: _Given.args, **named: _Given.kwargs) -> _Result:
        for listener in _listeners:
            listener.begin_kernel((given, named))
        result = function(*given, **named)
        for listener in _listeners:
            listener.end_kernel(function.__qualname__, result)
        return result

    return together


def aside(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """The same function, whose operators are counted nowhere: another queue's, or another library's way."""

    @wraps(function)
    def uncounted(*given: _Given.args, **named: _Given.kwargs) -> _Result:
        for listener in _listeners:
            listener.begin_kernel((given, named))
        result = function(*given, **named)
        for listener in _listeners:
            listener.drop_kernel()
        return result

    return uncounted
