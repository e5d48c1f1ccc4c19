"""A wall around what a process of a CPU run may take, so that a run that is wrong about its memory fails and is not
killed, nor the machine with it.

The kernel counts a process's own writable memory (RLIMIT_DATA); beyond the limit an allocation fails, which torch
raises as an error. What the limit cannot tell is tensors from all else, so it leaves room for the rest; the exact rule,
that no step's tensors take more than the budget, is held by the meter after each step. Large tensors are mapped apart
while the wall stands: out of malloc's heap, freed ones go back only when all above them is free (measured: 0.5 GiB of
tensors held 2 GiB). That costs a tenth of the processor's time.

Linux alone counts so; elsewhere nothing is limited.
"""

import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brim.units import GIB, MIB

BESIDES_BYTES = GIB
"""Room for what is no tensor: the meter's recording of a step, Python, libraries, and rounding to pages."""
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Of mallopt (malloc.h)."""
_APART_BYTES = MIB
_STATUS = Path("/proc/self/status")


@contextmanager
def walled(budget_bytes: int | None, *, allocated_bytes: int) -> Iterator[None]:
    """Within the block tensors may take `budget_bytes`, of which `allocated_bytes` are taken now; None: no limit."""
    if budget_bytes is None or sys.platform != "linux" or not _STATUS.exists():
        yield
        return
    map_apart()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = data_bytes() - allocated_bytes + budget_bytes + BESIDES_BYTES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def map_apart() -> None:
    """Blocks of a MiB or more are mapped each by itself from now on, and given back when they are freed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; musl maps large blocks apart anyway
        libc.mallopt(_MMAP_THRESHOLD, _APART_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _APART_BYTES)


def data_bytes() -> int:
    """What the kernel counts against RLIMIT_DATA now."""
    found = re.search(r"VmData:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024
