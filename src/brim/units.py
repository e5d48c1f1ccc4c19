"""The only formatter and parser of bytes, counts and durations.

Bytes are `int`. People read GiB (2^30); GB is read where a user writes it and never written.
"""

import re
from collections.abc import Callable
from decimal import Decimal

from brim.errors import UsageError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

Progress = Callable[[int, int], None]
"""Called by long work with (done, total) in units the work's docstring names."""

_BYTES_PER_UNIT = {
    "": 1, "B": 1,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": TIB,
    "K": KIB, "M": MIB, "G": GIB, "T": TIB,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_PER_COUNT_UNIT = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")

_COUNT = re.compile(r"\s*(\d[\d_,]*(?:\.\d+)?(?:[eE]\+?\d{1,2})?)\s*([A-Za-z]?)\s*")


def no_progress(done: int, total: int) -> None:
    """Listens to nothing."""


def parse_bytes(text: str) -> int:
    """Bytes in `24GiB`, `512MiB`, `1.5GB` or `1073741824`; a bare `24G` means GiB.

    Raises UsageError for anything else, and for zero.
    """
    match = _SIZE.fullmatch(text)
    unit = match and _BYTES_PER_UNIT.get(match[2].upper())
    if not match or not unit:
        raise UsageError(f"memory {text!r} is not a size; write a number and a unit, for example 24GiB or 512MiB")
    nbytes = int(Decimal(match[1]) * unit)
    if nbytes <= 0:
        raise UsageError(f"memory {text!r} is not more than zero; write for example 2GiB")
    return nbytes


def parse_count(text: str, *, what: str) -> int:
    """A whole number in `100B`, `2T`, `1.5e9` or `7_000_000`. Raises UsageError, naming `what`, else and for zero."""
    match = _COUNT.fullmatch(text)
    unit = match and _PER_COUNT_UNIT.get(match[2].upper())
    count = int(Decimal(match[1].replace("_", "").replace(",", "")) * unit) if match and unit else 0
    if not 0 < count < 10**18:
        raise UsageError(f"{what} {text!r} is not a count; write a number and K, M, B or T, for example 100B")
    return count


def format_bytes(nbytes: int) -> str:
    """`2.43 GiB`, `512 MiB`, `17 B`: three significant digits, binary units."""
    for size, unit in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(nbytes) >= size:
            return f"{_three_digits(nbytes / size)} {unit}"
    return f"{nbytes} B"


def format_count(count: float) -> str:
    """`134.5M`, `8.03B`, `1.02T`: decimal, as people count parameters and tokens."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= size:
            return f"{_three_digits(count / size)}{unit}"
    return f"{count:.3g}"


def format_duration(seconds: float) -> str:
    """`45 ms`, `0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`, `4 d 3 h`."""
    if 0 < seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _three_digits(value: float) -> str:
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"
