"""Runs conversions: blocks that stay in the processor's cache, chunks shared out to threads, a journal of what is done.

A chunk is some rows of one tensor. A worker reads it block by block into memory it has already, encodes each block and
writes the outputs to their places, which are known beforehand. How a tensor is cut depends on the tensor alone: the
same bytes and the same sums come out whatever the number of workers, and whether or not a run was interrupted.
"""

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

from brim.checkpoints.conversion import BLOCK_ELEMENTS, Conversion
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


class Chunk(NamedTuple):
    """Rows of one tensor."""

    conversion: Conversion
    first: int
    """Element of the source."""
    elements: int

    @property
    def source_bytes(self) -> int:
        return self.elements * element_type(self.conversion.source.spec).itemsize

    def spans(self) -> tuple[tuple[int, int], ...]:
        """For each output: the first byte, and the number of bytes, of what the rows become."""
        conversion = self.conversion
        begin, end = (-(-element // conversion.row_elements) for element in (self.first, self.first + self.elements))
        return tuple(
            (begin * row_bytes, min(spec.nbytes, end * row_bytes) - begin * row_bytes)
            for spec, row_bytes in zip(conversion.outputs, conversion.row_bytes, strict=True)
        )


def chunks_of(conversion: Conversion) -> Iterator[Chunk]:
    """The whole tensor, in order."""
    numel, size = _numel(conversion.source), CHUNK_BLOCKS * _block_elements(conversion)
    for first in range(0, numel, size):
        yield Chunk(conversion, first, min(size, numel - first))


def count_workers(conversions: Sequence[Conversion], *, memory_bytes: int) -> int:
    """Threads whose memory is within the limit, at most one for each core. Raises DoesNotFitError for less than one."""
    neediest = max(conversions, key=_worker_bytes)
    need = _worker_bytes(neediest)
    if need > memory_bytes:
        raise DoesNotFitError(
            f"tensor {neediest.source.spec.name!r}: {neediest.row_elements:,} elements must be encoded together, which "
            f"takes {format_bytes(need)}, and --memory allows {format_bytes(memory_bytes)}; allow more"
        )
    return min(len(os.sched_getaffinity(0)), memory_bytes // need)


Places = Mapping[str, tuple[Path, int]]
"""Of each output: its file, and the offset of its first byte."""


def convert(
    chunks: Sequence[Chunk],
    places: Places,
    *,
    workers: int,
    journal: Journal,
    collect: Callable[[Chunk, Done], None],
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
            keeper.add(done, (places[spec.name][0] for spec in chunk.conversion.outputs))


def look_through(chunks: Sequence[Chunk], *, workers: int, collect: Callable[[Chunk, Done], None]) -> None:
    """What converting the chunks would come to; nothing is written."""
    results = share_out(chunks, lambda chunk, scratch: _convert(chunk, None, scratch), workers=workers)
    with _one_thread(), closing(results):
        for chunk, done in zip(chunks, results, strict=True):
            collect(chunk, done)


def verify(done: Sequence[tuple[Chunk, Done]], places: Places, *, workers: int, count: Callable[[int], None]) -> None:
    """Raises ModelFileError unless the files hold, at these places, what was encoded.

    `count` is told of each number of bytes that were read.
    """

    def checksums(chunk: Chunk, scratch: Scratch) -> tuple[int, ...]:
        parts = zip(chunk.conversion.outputs, chunk.spans(), strict=True)
        return tuple(_crc32(places[spec.name], *span, scratch) for spec, span in parts)

    with closing(share_out((chunk for chunk, _ in done), checksums, workers=workers)) as found:
        for (chunk, kept), crc32 in zip(done, found, strict=True):
            if crc32 != kept.crc32:
                raise ModelFileError(
                    f"tensor {chunk.conversion.source.spec.name!r} came back from the disk other than it was written; "
                    "nothing was kept; check the disk"
                )
            count(sum(nbytes for _, nbytes in chunk.spans()))


def _convert(chunk: Chunk, places: Places | None, scratch: Scratch) -> Done:
    """Without places nothing is written."""
    conversion, spans = chunk.conversion, chunk.spans()
    source, dtype = conversion.source, element_type(conversion.source.spec)
    paths = [places[spec.name][0] for spec in conversion.outputs] if places else []
    begins = [places[spec.name][1] if places else 0 for spec in conversion.outputs]
    offsets = [begin + first for begin, (first, _) in zip(begins, spans, strict=True)]
    crc32, sums, rows_sums = [0] * len(offsets), Statistics(), list[RowSums]()
    with ExitStack() as files:
        reading = files.enter_context(opened(source))
        writing = [files.enter_context(_writable(path)) for path in paths]
        for first in range(chunk.first, chunk.first + chunk.elements, _block_elements(conversion)):
            elements = min(_block_elements(conversion), chunk.first + chunk.elements - first)
            block = scratch.take("block", (elements,), dtype)
            if _read_by_column(conversion):
                block = read_columns(reading, first // conversion.row_elements, block, source)
            else:
                read_into(reading, bytes_of(block), first * dtype.itemsize, source)
            rows = block.view(-1, conversion.row_elements) if conversion.row_elements > 1 else block
            encoded = conversion.encoded(rows, first // conversion.row_elements, scratch)
            if not (isinstance(encoded.statistics, RowSums) and bool(torch.isfinite(encoded.statistics.top_R).all())):
                _check_finite(block, source, first, by_column=conversion.by_column)
            for number, part in enumerate(encoded.parts):
                view = bytes_of(part)
                if writing:
                    write_at(writing[number], view, offsets[number])
                    crc32[number] = zlib.crc32(view, crc32[number])
                offsets[number] += len(view)
            if isinstance(encoded.statistics, RowSums):
                rows_sums.append(encoded.statistics)
            else:
                sums.add(encoded.statistics)
    if rows_sums:
        sums.add(add_up(rows_sums))
    assert offsets == [begin + sum(span) for begin, span in zip(begins, spans, strict=True)], source.spec.name
    return Done(tuple(crc32), sums)


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
        self._waiting: list[Done] = []
        self._paths: set[Path] = set()
        self._flushed_s = time.monotonic()
        self._entered = False

    def add(self, done: Done, paths: Iterable[Path]) -> None:
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


def _read_by_column(conversion: Conversion) -> bool:
    """Whether a row to encode is a column in the file."""
    return conversion.by_column != conversion.source.transposed


def _numel(source: StoredTensor) -> int:
    return source.spec.nbytes // element_type(source.spec).itemsize


def _block_elements(conversion: Conversion) -> int:
    """Whole rows."""
    return max(1, BLOCK_ELEMENTS // conversion.row_elements) * conversion.row_elements


def _worker_bytes(conversion: Conversion) -> int:
    elements = min(_block_elements(conversion), _numel(conversion.source))
    itemsize = element_type(conversion.source.spec).itemsize
    copies = 2 if _read_by_column(conversion) else 1
    return _READ_BACK_BYTES + elements * (copies * itemsize + conversion.work_bytes)
