"""Where conversions are made until they are whole: the files with their headers, and whether a killed run left some."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from brim import __version__
from brim.checkpoints.conversion import BLOCK_ELEMENTS
from brim.checkpoints.job import Job
from brim.checkpoints.journal import has_chunks, identity_in
from brim.checkpoints.layouts import gguf
from brim.checkpoints.stream import CHUNK_BLOCKS
from brim.checkpoints.writer import create
from brim.errors import Stopped, UsageError
from brim.models.directory import stored_tensors
from brim.models.gguf_header import read_gguf_header
from brim.publish import check_room, sync_tree

Jobs = Mapping[str, Job]
"""By the directory of each in the output; "." for the output itself."""
_SMALL_FILE_BYTES = 2**20
"""Allowed for config, index and report when disk space is checked, beside 1 KiB a tensor."""


def identity(jobs: Jobs) -> dict[str, Any]:
    """What must be the same for a killed run to be gone on with: the source's files, and all that is made of them."""
    sources = sorted({conversion.source.path for job in jobs.values() for conversion in job.conversions})
    made = hashlib.sha256()
    for directory, job in jobs.items():
        for file in job.files:
            made.update(f"{directory}/{file.name}".encode() + file.header)
        for name, text in job.texts.items():
            made.update((name + text).encode())
    status = [(path, path.stat()) for path in sources]
    return {
        "brim": __version__,
        "settings": [job.settings for job in jobs.values()],
        "cut": [BLOCK_ELEMENTS, CHUNK_BLOCKS],
        "source": [[path.name, facts.st_size, facts.st_mtime_ns] for path, facts in status],
        "output": made.hexdigest(),
    }


def check_workplace(partial: Path, jobs: Jobs, *, output: Path, resume: bool) -> bool:
    """Whether `partial` has what a killed run did, to go on from.

    Raises UsageError where it is other work that is to be gone on with, DoesNotFitError where the disk lacks the room.
    """
    found = identity_in(partial) if resume else None
    if found is not None and found != identity(jobs):
        raise UsageError(
            f"{partial} is a killed run of another model, format or version of Brim; run without --resume to start over"
        )
    if found is None:
        shutil.rmtree(partial, ignore_errors=True)
    need_bytes = sum(_need_bytes(job) for job in jobs.values())
    need_bytes -= sum(512 * path.stat().st_blocks for path in partial.rglob("*"))
    check_room(partial.parent, need_bytes, what=f"output {output}")
    return found is not None


def _need_bytes(job: Job) -> int:
    small_bytes = _SMALL_FILE_BYTES + 1024 * len(job.conversions) + sum(len(text) for text in job.texts.values())
    return sum(file.nbytes for file in job.files) + small_bytes


def create_files(directory: Path, jobs: Jobs) -> None:
    """All files, of full length; only what is converted is not in them."""
    for place, job in jobs.items():
        (directory / place).mkdir(parents=True)
        constants = dict(constant for conversion in job.conversions for constant in conversion.constants)
        for file in job.files:
            contents = {spec.name: constants[spec] for spec in file.tensors if spec in constants}
            create(directory / place / file.name, file, contents)
        for name, text in job.texts.items():
            (directory / place / name).write_text(text, encoding="utf-8")
    sync_tree(directory)


@contextmanager
def removed_unless_resumable(partial: Path) -> Iterator[None]:
    """Of an interrupted run that was long enough to have lines in its journal the work is kept; else nothing is."""
    kept = False
    try:
        yield
    except KeyboardInterrupt:
        kept = has_chunks(partial)
        if not kept:
            raise
        raise Stopped(
            f"interrupted; what was done is kept in {partial}: the same command with --resume goes on from there"
        ) from None
    finally:
        if not kept:
            shutil.rmtree(partial, ignore_errors=True)


def places_read(directory: Path, job: Job) -> Mapping[str, tuple[Path, int]]:
    """Where the headers of the files, read anew, say that the tensors are."""
    if job.layout == gguf.LAYOUT:
        path = directory / gguf.NAME
        header = read_gguf_header(path)
        return {entry.spec.name: (path, header.data_start + entry.begin) for entry in header.tensors}
    return {stored.spec.name: (stored.path, stored.offset) for stored in stored_tensors(directory)}
