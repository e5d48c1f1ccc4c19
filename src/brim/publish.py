"""Outputs appear whole or not at all: written beside their place, forced to the disk, then renamed."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brim.errors import DoesNotFitError
from brim.units import format_bytes


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends well, and is removed when it does not.

    What a killed run left beside `target` is removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-"
    for leftover in target.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(leftover)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    partial.chmod(0o755)
    try:
        yield partial
        sync_tree(partial)
        partial.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
