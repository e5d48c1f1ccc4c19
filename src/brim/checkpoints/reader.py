"""Reads the tensors of a model directory a tile at a time.

Headers are checked by `brim.models` first. Bytes are then read, not mapped: what is held is one tile, whatever the size
of a tensor, and a file that shrinks under the reader is an error instead of a crash.
"""

from collections.abc import Iterator
from io import FileIO

import torch
from torch import Tensor

from brim.errors import ModelFileError
from brim.models.directory import StoredTensor
from brim.models.files import unreadable
from brim.numerics.encode import TORCH_DTYPES

TILE_ELEMENTS = 2**20
"""Of one tile, unless a single row is longer. 4 MiB in FP32: the tile and its copies stay in the processor's cache."""


def tiles(stored: StoredTensor, *, row_elements: int = 1) -> Iterator[Tensor]:
    """The tensor's elements in order, as 1-D tensors of whole rows; as bytes where torch lacks the dtype.

    Raises ModelFileError where the file cannot be read to the tensor's end.
    """
    dtype = TORCH_DTYPES.get(stored.spec.dtype, torch.uint8)
    numel = stored.spec.nbytes // dtype.itemsize
    tile = max(1, TILE_ELEMENTS // row_elements) * row_elements
    try:
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            for first in range(0, numel, tile):
                yield torch.frombuffer(_read(file, min(tile, numel - first) * dtype.itemsize, stored), dtype=dtype)
    except OSError as error:
        raise unreadable(stored.path, error) from None


def _read(file: FileIO, nbytes: int, stored: StoredTensor) -> bytearray:
    buffer = bytearray(nbytes)
    left = memoryview(buffer)
    while left:
        got = file.readinto(left)
        if not got:
            raise ModelFileError(
                f"{stored.path}: ended inside tensor {stored.spec.name!r} while it was read; another program changed it"
            )
        left = left[got:]
    return buffer
