"""Reads the tensors of a model directory a tile at a time.

Headers are checked by `brim.models` first. Bytes are then read, not mapped: what is held is one tile, whatever the size
of a tensor, and a file that shrinks under the reader is an error instead of a crash.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from brim.checkpoints.pieces import read_pieces
from brim.errors import ModelFileError
from brim.models.directory import StoredTensor
from brim.models.files import unreadable
from brim.models.spec import TensorSpec
from brim.numerics.encode import TORCH_DTYPES

TILE_ELEMENTS = 2**20
"""Of one tile, unless a single row is longer. 4 MiB in FP32: the tile and its copies stay in the processor's cache."""


def tiles(stored: StoredTensor, *, row_elements: int = 1) -> Iterator[Tensor]:
    """The tensor's elements in order, as 1-D tensors of whole rows; as bytes where torch lacks the dtype.

    Raises ModelFileError where the file cannot be read to the tensor's end.
    """
    dtype = element_type(stored.spec)
    numel = stored.spec.nbytes // dtype.itemsize
    tile = max(1, TILE_ELEMENTS // row_elements) * row_elements
    with opened(stored) as descriptor:
        for first in range(0, numel, tile):
            buffer = bytearray(min(tile, numel - first) * dtype.itemsize)
            read_into(descriptor, memoryview(buffer), first * dtype.itemsize, stored)
            yield torch.frombuffer(buffer, dtype=dtype)


def element_type(spec: TensorSpec) -> torch.dtype:
    """Of the tensors that a file's bytes are read as."""
    return TORCH_DTYPES.get(spec.dtype, torch.uint8)


@contextmanager
def opened(stored: StoredTensor) -> Iterator[int]:
    """The descriptor of the tensor's file. Raises ModelFileError where the system does not give it out."""
    try:
        descriptor = os.open(stored.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(stored.path, error) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_into(descriptor: int, left: memoryview, begin: int, stored: StoredTensor) -> None:
    """Fill the buffer with the tensor's bytes from its byte `begin` on. Raises ModelFileError at the file's end."""
    if stored.pieces is not None:
        read_pieces(descriptor, left, begin, stored.pieces, where=f"{stored.path}: tensor {stored.spec.name!r}")
        return
    offset = stored.offset + begin
    while left:
        try:
            got = os.preadv(descriptor, [left], offset)
        except OSError as error:
            raise unreadable(stored.path, error) from None
        if not got:
            raise ModelFileError(
                f"{stored.path}: ended inside tensor {stored.spec.name!r} while it was read; another program changed it"
            )
        left, offset = left[got:], offset + got


def read_columns(descriptor: int, first: int, buffer: Tensor, stored: StoredTensor) -> Tensor:
    """Columns of the matrix in the file from column `first` on, as many as fill the buffer, one after another, anew.

    Reads a piece of each row. Raises ModelFileError at the file's end.
    """
    rows, width = stored.spec.shape[::-1] if stored.transposed else stored.spec.shape
    pieces = buffer.view(rows, -1)
    left = pieces.view(torch.uint8).numpy().data.cast("B")
    piece_bytes, row_bytes = len(left) // rows, width * buffer.itemsize
    for row in range(rows):
        piece = left[row * piece_bytes : (row + 1) * piece_bytes]
        read_into(descriptor, piece, row * row_bytes + first * buffer.itemsize, stored)
    return pieces.t().reshape(-1)
