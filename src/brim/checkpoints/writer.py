"""Writes safetensors files whose tensors are known by name, shape and dtype before their bytes exist.

The header comes first, so every tensor has its place from the start: bytes are appended to any tensor in any order and
none is held. How this differs from the `safetensors` library: it needs all tensors of a file in memory at once.
"""

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from brim.models.directory import INDEX, SINGLE
from brim.models.safetensors_header import DTYPES, LENGTH_BYTES
from brim.models.spec import TensorSpec
from brim.numerics.formats import SAFETENSORS_CODES

SHARD_BYTES = 5 * 10**9
"""Most bytes of one file, as transformers splits too; a single tensor may be larger."""


class Written(NamedTuple):
    """What has been written of one tensor."""

    nbytes: int
    crc32: int


class SafetensorsWriter:
    """One file under construction. Leaving the block without an error means: complete and on the disk."""

    def __init__(self, path: Path, tensors: Iterable[TensorSpec]) -> None:
        self.path = path
        self.tensors = in_file_order(tensors)
        header = header_bytes(self.tensors)
        self._begin: dict[str, int] = {}
        end = len(header)
        for tensor in self.tensors:
            self._begin[tensor.name] = end
            end += tensor.nbytes
        self.written = dict.fromkeys(self._begin, Written(0, 0))
        self._file = path.open("xb", buffering=0)
        try:
            self._write_all(memoryview(header))
            self._file.truncate(end)
        except BaseException:
            self._file.close()
            raise

    def append(self, name: str, part: Tensor) -> None:
        """The next bytes of this tensor."""
        view = part.contiguous().reshape(-1).view(torch.uint8).numpy().data
        nbytes, crc32 = self.written[name]
        self._file.seek(self._begin[name] + nbytes)
        self._write_all(view)
        self.written[name] = Written(nbytes + len(view), zlib.crc32(view, crc32))

    def _write_all(self, left: memoryview) -> None:
        # A raw file may take less than it is given, for example the last bytes of a full disk.
        while left:
            left = left[self._file.write(left) :]

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                short = [tensor.name for tensor in self.tensors if self.written[tensor.name].nbytes != tensor.nbytes]
                assert not short, f"{self.path}: not as many bytes as the header says: {short[:4]}"
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def in_file_order(tensors: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Widest elements first, then by name: each tensor then begins at a multiple of its element's size."""
    return tuple(sorted(tensors, key=lambda tensor: (-_element_bits(tensor), tensor.name)))


def header_bytes(tensors: Sequence[TensorSpec]) -> bytes:
    """The front of a file with these tensors in this order: length, JSON, spaces up to a multiple of 8."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        code = SAFETENSORS_CODES[tensor.dtype]
        fields[tensor.name] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + tensor.nbytes],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


class Shard(NamedTuple):
    """One file of a model."""

    file_name: str
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return len(header_bytes(in_file_order(self.tensors))) + sum(tensor.nbytes for tensor in self.tensors)


def plan_shards(groups: Iterable[Sequence[TensorSpec]], *, limit_bytes: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """Groups of tensors (a weight and its scales) in order, no group torn apart, each file filled up to the limit."""
    files: list[list[TensorSpec]] = [[]]
    for group in groups:
        if files[-1] and _nbytes(files[-1]) + _nbytes(group) > limit_bytes:
            files.append([])
        files[-1].extend(group)
    if len(files) == 1:
        return (Shard(SINGLE, tuple(files[0])),)
    names = (f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1))
    return tuple(Shard(name, tuple(tensors)) for name, tensors in zip(names, files, strict=True))


def write_index(directory: Path, shards: Sequence[Shard]) -> None:
    """The index of a sharded model; a model of one file has none."""
    if len(shards) == 1:
        return
    weight_map = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    total = sum(_nbytes(shard.tensors) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _nbytes(tensors: Iterable[TensorSpec]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _element_bits(tensor: TensorSpec) -> int:
    return DTYPES[SAFETENSORS_CODES[tensor.dtype]][1]
