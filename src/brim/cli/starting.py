"""A quicker start for verbs: what the collector of garbage and torch's compiler need not do."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside the block nothing looks for garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def quick_imports() -> Iterator[None]:
    """Inside the block only libraries are imported: the collector waits, and what they decorate is not compiled.

    A tenth of the time went into looking for garbage among half a million new objects, which live to the end: the
    collector does not look at them again, either. Another tenth went into loading torch's compiler, for functions that
    bitsandbytes 0.50.2 compiles where its own library is missing; they run as they are written.
    """
    setting = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        with uncollected():
            yield
            gc.freeze()
    finally:
        if setting is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = setting
