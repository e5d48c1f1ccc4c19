"""`journal.jsonl` of a conversion under way: how much is on the disk, so that a killed run can go on.

The first line says of what the work is; a journal of other work is not gone on from. Each further line is the next
chunk: for each of its conversions the checksums of what was written, and the sums for the report. A line is written
after the bytes that it vouches for are on the disk. Python writes floats so that they are read back exactly: the report
of a resumed run is that of an undisturbed one, byte by byte.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from brim.checkpoints.statistics import Statistics

NAME = "journal.jsonl"


class Done(NamedTuple):
    """A chunk that has been converted, in one way."""

    crc32: tuple[int, ...]
    """Of its bytes in each output."""
    statistics: Statistics


class Journal:
    """Open for adding lines; `done` is what was in it, without a last line that was cut short."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        path = directory / NAME
        lines, whole_bytes = _whole_lines(path)
        self.done = tuple(_read(line) for line in lines[1:])
        self._file = path.open("ab", buffering=0)
        os.ftruncate(self._file.fileno(), whole_bytes)
        if not lines:
            self._append([json.dumps(identity)])

    def add(self, chunks: Iterable[Sequence[Done]]) -> None:
        """The next chunks, which are on the disk."""
        rows = ([[list(done.crc32), done.statistics.to_list()] for done in chunk] for chunk in chunks)
        self._append(json.dumps(row, separators=(",", ":")) for row in rows)

    def _append(self, lines: Iterable[str]) -> None:
        left = "".join(f"{line}\n" for line in lines).encode()
        while left:
            left = left[self._file.write(left) :]
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def identity_in(directory: Path) -> dict[str, Any] | None:
    """Of what work the journal in this directory is; None where there is no journal."""
    lines, _ = _whole_lines(directory / NAME)
    return json.loads(lines[0]) if lines else None


def has_chunks(directory: Path) -> bool:
    """Whether there is something to go on from."""
    lines, _ = _whole_lines(directory / NAME)
    return len(lines) > 1


def _whole_lines(path: Path) -> tuple[list[bytes], int]:
    """Lines that end, and the bytes they take."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    return whole.splitlines(), len(whole)


def _read(line: bytes) -> tuple[Done, ...]:
    return tuple(Done(tuple(crc32), Statistics(*sums)) for crc32, sums in json.loads(line))
