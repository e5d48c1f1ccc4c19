"""Runs conversions: blocks that stay in the processor's cache, chunks shared out to threads, a journal of what is done.

A chunk is some rows of one tensor. A worker reads it block by block into memory it has already, encodes each block,
once for each output that wants it, and writes what comes of it to places that are known beforehand. How a tensor is cut
depends on the tensor alone: the same bytes and the same sums come out whatever the number of workers, and whether or
not a run was interrupted.
"""

import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from brim.checkpoints.conversion import BLOCK_ELEMENTS, Conversion, Encoded
from brim.checkpoints.crew import share_out
from brim.checkpoints.journal import Done, Journal
from brim.checkpoints.reader import element_type, opened, read_columns, read_into
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import RowSums, Statistics, add_up
from brim.checkpoints.writer import bytes_of, write_at
from brim.errors import DoesNotFitError, ModelFileError
from brim.models.directory import StoredTensor
from brim.publish import sync
from brim.units import format_bytes

CHUNK_BLOCKS = 32
"""Done by one worker, on one line of the journal."""
FLUSH_S = 1.0
"""Between two times that what was written is forced to the disk and entered in the journal."""

_READ_BACK_BYTES = 2**20


class Reading(NamedTuple):
    """A tensor that is read once, and what becomes of it in each of the outputs."""

    conversions: tuple[Conversion, ...]
    jobs: tuple[int, ...]
    """For each conversion the number of the job that it is of."""

    @property
    def source(self) -> StoredTensor:
        return self.conversions[0].source

    @property
    def by_column(self) -> bool:
        return self.conversions[0].by_column

    @property
    def reads_columns(self) -> bool:
        """Whether a row to encode is a column in the file."""
        return self.by_column != self.source.transposed

    @property
    def column_elements(self) -> int:
        """Of one column in the file."""
        return self.source.spec.shape[0 if self.by_column else -1]

    @property
    def row_elements(self) -> int:
        """Whole rows of all conversions."""
        return math.lcm(*(conversion.unit_elements for conversion in self.conversions))

    @property
    def block_elements(self) -> int:
        at_once = BLOCK_ELEMENTS * min(conversion.blocks_at_once for conversion in self.conversions)
        return max(1, at_once // self.row_elements) * self.row_elements

    @property
    def chunk_elements(self) -> int:
        """Whole blocks."""
        return max(1, CHUNK_BLOCKS * BLOCK_ELEMENTS // self.block_elements) * self.block_elements


def readings_of(jobs: Sequence[Sequence[Conversion]]) -> tuple[Reading, ...]:
    """Each tensor once, in the order in which it first comes; twice if one of the jobs reads it by column."""
    found: dict[object, list[tuple[Conversion, int]]] = {}
    for number, conversions in enumerate(jobs):
        for conversion in conversions:
            source = conversion.source
            key = (source.path, source.offset, source.spec.shape, source.spec.dtype, conversion.by_column)
            found.setdefault(key, []).append((conversion, number))
    return tuple(Reading(*zip(*pairs, strict=True)) for pairs in found.values())


class Chunk(NamedTuple):
    """Rows of one tensor."""

    reading: Reading
    first: int
    """Element of the source."""
    elements: int

    @property
    def source_bytes(self) -> int:
        return self.elements * element_type(self.reading.source.spec).itemsize

    def spans(self, conversion: Conversion) -> tuple[tuple[int, int], ...]:
        """For each of its outputs: the first byte, and the number of bytes, of what the rows become."""
        begin, end = (-(-element // conversion.unit_elements) for element in (self.first, self.first + self.elements))
        return tuple(
            (begin * row_bytes, min(spec.nbytes, end * row_bytes) - begin * row_bytes)
            for spec, row_bytes in zip(conversion.outputs, conversion.row_bytes, strict=True)
        )


def chunks_of(readings: Iterable[Reading]) -> tuple[Chunk, ...]:
    """All of these tensors, in order."""
    return tuple(
        Chunk(reading, first, min(size, _numel(reading.source) - first))
        for reading in readings
        for size in (reading.chunk_elements,)
        for first in range(0, _numel(reading.source), size)
    )


def count_workers(readings: Sequence[Reading], *, memory_bytes: int) -> int:
    """Threads whose memory is within the limit, at most one for each core. Raises DoesNotFitError for less than one."""
    neediest = max(readings, key=_worker_bytes)
    need = _worker_bytes(neediest)
    if need > memory_bytes:
        raise DoesNotFitError(
            f"tensor {neediest.source.spec.name!r}: {neediest.row_elements:,} elements must be encoded together, which "
            f"takes {format_bytes(need)}, and --memory allows {format_bytes(memory_bytes)}; allow more"
        )
    return min(len(os.sched_getaffinity(0)), memory_bytes // need)


Places = Sequence[Mapping[str, tuple[Path, int]]]
"""For each job, of each output by name: its file, and the offset of its first byte."""


def convert(
    chunks: Sequence[Chunk],
    places: Places,
    *,
    workers: int,
    journal: Journal,
    collect: Callable[[Chunk, tuple[Done, ...]], None],
) -> None:
    """Do the chunks that the journal lacks; `collect` is told of each, in order, also of those that it has.

    When this returns, all is on the disk. Where an error ends it, the journal has what was done before.
    """
    for chunk, done in zip(chunks, journal.done, strict=False):
        collect(chunk, done)
    left = chunks[len(journal.done) :]
    results = share_out(left, lambda chunk, scratch: _convert(chunk, places, scratch), workers=workers)
    with _one_thread(), _Keeper(journal) as keeper, closing(results):
        for chunk, done in zip(left, results, strict=True):
            collect(chunk, done)
            keeper.add(done, (path for path, _ in _places_of(chunk, places)))


def look_through(chunks: Sequence[Chunk], *, workers: int, collect: Callable[[Chunk, tuple[Done, ...]], None]) -> None:
    """What converting the chunks would come to; nothing is written."""
    results = share_out(chunks, lambda chunk, scratch: _convert(chunk, None, scratch), workers=workers)
    with _one_thread(), closing(results):
        for chunk, done in zip(chunks, results, strict=True):
            collect(chunk, done)


def verify(
    done: Sequence[tuple[Chunk, tuple[Done, ...]]], places: Places, *, workers: int, count: Callable[[int], None]
) -> None:
    """Raises ModelFileError unless the files hold, at these places, what was encoded.

    `count` is told of each number of bytes that were read.
    """

    def checksums(chunk: Chunk, scratch: Scratch) -> tuple[int, ...]:
        spans = (span for conversion in chunk.reading.conversions for span in chunk.spans(conversion))
        return tuple(
            _crc32(place, *span, scratch) for place, span in zip(_places_of(chunk, places), spans, strict=True)
        )

    with closing(share_out((chunk for chunk, _ in done), checksums, workers=workers)) as found:
        for (chunk, kept), crc32 in zip(done, found, strict=True):
            if crc32 != tuple(each for output in kept for each in output.crc32):
                raise ModelFileError(
                    f"tensor {chunk.reading.source.spec.name!r} came back from the disk other than it was written; "
                    "nothing was kept; check the disk"
                )
            count(sum(nbytes for each in chunk.reading.conversions for _, nbytes in chunk.spans(each)))


def _places_of(chunk: Chunk, places: Places) -> Iterator[tuple[Path, int]]:
    """Of the outputs of each conversion, in order."""
    for conversion, job in zip(*chunk.reading, strict=True):
        yield from (places[job][spec.name] for spec in conversion.outputs)


def _convert(chunk: Chunk, places: Places | None, scratch: Scratch) -> tuple[Done, ...]:
    """What was done for each conversion. Without places nothing is written."""
    reading = chunk.reading
    source, dtype, size = reading.source, element_type(reading.source.spec), reading.block_elements
    with ExitStack() as files:
        descriptor = files.enter_context(opened(source))
        writers = [
            _Writer(chunk, conversion, None if places is None else places[job], files)
            for conversion, job in zip(*reading, strict=True)
        ]
        for first in range(chunk.first, chunk.first + chunk.elements, size):
            elements = min(size, chunk.first + chunk.elements - first)
            block = scratch.take("block", (elements,), dtype)
            if reading.reads_columns:
                block = read_columns(descriptor, first // reading.column_elements, block, source)
            else:
                read_into(descriptor, bytes_of(block), first * dtype.itemsize, source)
            for number, writer in enumerate(writers):
                encoded = writer.encode(block, first, scratch)
                if number == 0 and not _is_finite(encoded.statistics):
                    _check_finite(block, source, first, by_column=reading.by_column)
                writer.write(encoded)
        return tuple(writer.done() for writer in writers)


class _Writer:
    """The outputs of one conversion, over a chunk."""

    def __init__(
        self, chunk: Chunk, conversion: Conversion, places: Mapping[str, tuple[Path, int]] | None, files: ExitStack
    ) -> None:
        spans = chunk.spans(conversion)
        found = [places[spec.name] for spec in conversion.outputs] if places else []
        begins = [begin for _, begin in found] if places else [0] * len(spans)
        self._conversion = conversion
        self._files = [files.enter_context(_writable(path)) for path, _ in found]
        self._offsets = [begin + first for begin, (first, _) in zip(begins, spans, strict=True)]
        self._ends = [begin + first + nbytes for begin, (first, nbytes) in zip(begins, spans, strict=True)]
        self._crc32 = [0] * len(spans)
        self._sums, self._rows_sums = Statistics(), list[RowSums]()

    def encode(self, block: Tensor, first: int, scratch: Scratch) -> Encoded:
        width = self._conversion.row_elements
        rows = block.view(-1, width) if width > 1 else block
        return self._conversion.encoded(rows, first // width, scratch)

    def write(self, encoded: Encoded) -> None:
        for number, part in enumerate(encoded.parts):
            view = bytes_of(part)
            if self._files:
                write_at(self._files[number], view, self._offsets[number])
                self._crc32[number] = zlib.crc32(view, self._crc32[number])
            self._offsets[number] += len(view)
        if isinstance(encoded.statistics, RowSums):
            self._rows_sums.append(encoded.statistics)
        else:
            self._sums.add(encoded.statistics)

    def done(self) -> Done:
        assert self._offsets == self._ends, self._conversion.source.spec.name
        if self._rows_sums:
            self._sums.add(add_up(self._rows_sums))
        return Done(tuple(self._crc32), self._sums)


def _is_finite(statistics: Statistics | RowSums) -> bool:
    """Whether that is known already."""
    return isinstance(statistics, RowSums) and bool(torch.isfinite(statistics.top_R).all())


def _crc32(place: tuple[Path, int], first: int, nbytes: int, scratch: Scratch) -> int:
    path, begin = place
    crc32 = 0
    with path.open("rb", buffering=0) as file:
        file.seek(begin + first)
        while nbytes:
            view = bytes_of(scratch.take("read back", (min(nbytes, _READ_BACK_BYTES),), torch.uint8))
            got = file.readinto(view)
            if not got:
                break  # a file that lost its end: what is missing is missing from the checksum
            crc32 = zlib.crc32(view[:got], crc32)
            nbytes -= got
    return crc32


def _check_finite(block: Tensor, source: StoredTensor, first: int, *, by_column: bool = False) -> None:
    """Raises ModelFileError with the place of the first NaN or Inf; the block begins at element `first`, counted
    down the columns if `by_column`."""
    if not block.is_floating_point():
        return
    if block.itemsize == 1:
        block = block.float()  # torch neither adds FP8 nor asks it for Inf
    # One pass: the sum of a tensor is finite only if its elements are (it may overflow all the same, so look again).
    if bool(torch.isfinite(block.sum())):
        return
    wrong = (~torch.isfinite(block)).nonzero()
    if len(wrong):
        place = int(wrong[0])
        shape = source.spec.shape[::-1] if by_column else source.spec.shape
        index = [int(axis) for axis in torch.unravel_index(torch.tensor(first + place), shape)]
        index = index[::-1] if by_column else index
        raise ModelFileError(
            f"{source.path}: tensor {source.spec.name!r} holds {float(block[place])} at index {index}; "
            "a model with such weights cannot be right, so it is not converted"
        )


class _Keeper:
    """Enters chunks in the journal, once they are on the disk.

    Where an error ends the work the last ones are entered too, unless all took so little time that none is yet.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._waiting: list[tuple[Done, ...]] = []
        self._paths: set[Path] = set()
        self._flushed_s = time.monotonic()
        self._entered = False

    def add(self, done: tuple[Done, ...], paths: Iterable[Path]) -> None:
        self._waiting.append(done)
        self._paths.update(paths)
        if time.monotonic() - self._flushed_s > FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        for path in self._paths:
            sync(path)
        self._journal.add(self._waiting)
        self._entered = True
        self._waiting.clear()
        self._paths.clear()
        self._flushed_s = time.monotonic()

    def __enter__(self) -> "_Keeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._waiting and (error is None or self._entered):
            self._flush()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Of torch, in each worker: a block's operation takes a fraction of a millisecond, too little to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _writable(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _numel(source: StoredTensor) -> int:
    return source.spec.nbytes // element_type(source.spec).itemsize


def _worker_bytes(reading: Reading) -> int:
    elements = min(reading.block_elements, _numel(reading.source))
    itemsize = element_type(reading.source.spec).itemsize
    copies = 2 if reading.reads_columns else 1
    return _READ_BACK_BYTES + elements * (copies * itemsize + sum(each.work_bytes for each in reading.conversions))
