"""Outputs appear whole or not at all: written beside their place, forced to the disk, renamed; by one run at a time."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brim.errors import DoesNotFitError, UsageError
from brim.units import format_bytes


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """While the block runs no other process makes `target`. Raises UsageError when one does already.

    The lock is `.NAME.lock` beside it: the system lets go of it when its process ends, however that ends, and it is
    removed when the block ends. (filelock 4 has such a lock too, but cannot remove its file without a race.)
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    descriptor = _locked(path, target)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, target: Path) -> int:
    """The descriptor of this file, once nobody else holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file after it was opened here: then this lock is on nothing.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"another run is writing {target} at this moment; wait for its end, or choose another --output"
            ) from None


def partial_of(target: Path) -> Path:
    """Where `target` is made."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends well, and is removed when it does not.

    What a killed run left in its place is removed first. Raises UsageError when another process makes `target` now.
    """
    partial = partial_of(target)
    with alone(target):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            appear(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def appear(partial: Path, target: Path) -> None:
    """Give a finished directory its name, once all of it is on the disk."""
    partial.chmod(0o755)
    sync_tree(partial)
    partial.rename(target)
    sync(target.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a small text file; a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).chmod(0o644)
        Path(partial).rename(path)
    finally:
        Path(partial).unlink(missing_ok=True)


def check_room(directory: Path, need_bytes: int, *, what: str) -> None:
    """Raises DoesNotFitError when the disk of `directory` (or of its nearest existing parent) lacks the room."""
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < need_bytes:
        raise DoesNotFitError(
            f"{what} takes {format_bytes(need_bytes)} of disk and {existing} has {format_bytes(free_bytes)}: "
            f"{format_bytes(need_bytes - free_bytes)} are missing; free some, or choose a place on a larger disk"
        )


def sync_tree(directory: Path) -> None:
    """Files and directories are on the disk, not only in the system's memory, when this returns."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
