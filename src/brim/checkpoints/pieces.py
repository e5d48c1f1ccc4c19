"""Datasets that HDF5 holds in pieces (its chunks), compressed or not: read as if they lay in one run.

The pieces' places come from the file's own table; they are read and unpacked here, so that no weight passes through the
HDF5 library. A few unpacked pieces are kept, since rows that are read one after another share them.
Shapes: R rows, K columns as the file has them; a vector is one row.
"""

import os
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brim.errors import ModelFileError
from brim.models.pieces import Pieces

DEFLATE, SHUFFLE = 1, 2
"""HDF5's numbers of the filters that Keras and h5py can ask for without a plugin."""
MAX_PIECE_BYTES = 2**22
"""Of one when it is unpacked; h5py chooses up to 1 MiB."""
_KEPT = 8

Bytes = NDArray[np.uint8]


def read_pieces(descriptor: int, left: memoryview, begin: int, pieces: Pieces, *, where: str) -> None:
    """Fill the buffer with the dataset's bytes from its byte `begin` on. Raises ModelFileError for damaged pieces."""
    buffer = np.frombuffer(left, np.uint8)
    form = _Form(pieces.piece_shape, pieces.itemsize, pieces.filters)
    facts, at = os.fstat(descriptor), 0
    file = (facts.st_dev, facts.st_ino, facts.st_mtime_ns)
    for row, first, last in _runs(begin, len(left), pieces):
        for column in range(first // pieces.piece_shape[1], -(-last // pieces.piece_shape[1])):
            start = column * pieces.piece_shape[1]
            low, high = max(first, start), min(last, start + pieces.piece_shape[1])
            number = row // pieces.piece_shape[0] * pieces.across + column
            piece = _unpacked(descriptor, file, pieces.places[number], form)
            if piece is None:
                raise ModelFileError(f"{where}: piece {number} does not unpack to its bytes; the file is damaged")
            line = piece[row % pieces.piece_shape[0]]
            nbytes = (high - low) * pieces.itemsize
            buffer[at : at + nbytes] = line[(low - start) * pieces.itemsize : (high - start) * pieces.itemsize]
            at += nbytes


def _runs(begin: int, nbytes: int, pieces: Pieces) -> Iterator[tuple[int, int, int]]:
    """(row, first column, one past the last) of each row's part of these bytes."""
    first, end, width = begin // pieces.itemsize, (begin + nbytes) // pieces.itemsize, pieces.shape[1]
    while first < end:
        row, column = divmod(first, width)
        last = min(width, column + end - first)
        yield row, column, last
        first += last - column


class _Form(NamedTuple):
    """What all pieces of a dataset have in common."""

    shape: tuple[int, int]
    itemsize: int
    filters: tuple[int, ...]


@lru_cache(maxsize=_KEPT)
def _unpacked(descriptor: int, _: tuple[int, int, int], place: tuple[int, int, int], form: _Form) -> Bytes | None:
    """(rows of the piece, bytes of one); None of a damaged one. The second argument says which file is read."""
    offset, nbytes, left_out = place
    content = os.pread(descriptor, nbytes, offset)
    rows, columns = form.shape
    wanted = rows * columns * form.itemsize
    for number in reversed(range(len(form.filters))):
        if not left_out >> number & 1:
            unpack = _inflated if form.filters[number] == DEFLATE else _unshuffled
            content = unpack(content, wanted, form.itemsize)
    return np.frombuffer(content, np.uint8).reshape(rows, -1) if len(content) == wanted else None


def _inflated(content: bytes, most_bytes: int, _: int) -> bytes:
    """At most one byte more than there ought to be, whatever the stream would grow to; nothing of a damaged one."""
    try:
        return zlib.decompressobj().decompress(content, most_bytes + 1)
    except zlib.error:
        return b""


def _unshuffled(content: bytes, most_bytes: int, itemsize: int) -> bytes:
    """All elements' first bytes come first there, then all second ones."""
    if len(content) % itemsize or len(content) > most_bytes:
        return b""
    return np.frombuffer(content, np.uint8).reshape(itemsize, -1).T.tobytes()
