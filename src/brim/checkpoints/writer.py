"""Writes safetensors files whose tensors are known by name, shape and dtype before their bytes exist.

The header comes first, so every tensor has its place from the start: bytes are written to any tensor in any order and
none is held. How this differs from the `safetensors` library: it needs all tensors of a file in memory at once.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from brim.models.directory import SINGLE
from brim.models.safetensors_header import DTYPES, LENGTH_BYTES
from brim.models.spec import TensorSpec
from brim.numerics.formats import SAFETENSORS_CODES

SHARD_BYTES = 5 * 10**9
"""Most bytes of one file, as transformers splits too; a single tensor may be larger."""


class OutputFile(NamedTuple):
    """One file to write: the bytes of its front, and where each tensor's bytes begin."""

    name: str
    tensors: tuple[TensorSpec, ...]
    """In the order of their bytes."""
    header: bytes
    places: Mapping[str, int]
    """Offsets in the file."""
    alignment: int = 1
    """The file's length is a multiple of it."""

    @property
    def nbytes(self) -> int:
        end = max((self.places[spec.name] + spec.nbytes for spec in self.tensors), default=len(self.header))
        return -(-end // self.alignment) * self.alignment


_NO_METADATA: Mapping[str, str] = {}


def safetensors_file(
    name: str, tensors: Iterable[TensorSpec], *, metadata: Mapping[str, str] = _NO_METADATA
) -> OutputFile:
    """A safetensors file of these tensors."""
    ordered = in_file_order(tensors)
    header = header_bytes(ordered, metadata=metadata)
    ends = accumulate((spec.nbytes for spec in ordered), initial=len(header))
    return OutputFile(name, ordered, header, {spec.name: begin for spec, begin in zip(ordered, ends, strict=False)})


def create(path: Path, file: OutputFile, contents: Mapping[str, bytes]) -> None:
    """The file with its header, the contents of some tensors, and room for the others that takes no disk yet."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        write_at(descriptor, memoryview(file.header), 0)
        os.ftruncate(descriptor, file.nbytes)
        for name, content in contents.items():
            write_at(descriptor, memoryview(content), file.places[name])
    finally:
        os.close(descriptor)


def write_at(descriptor: int, left: memoryview, offset: int) -> None:
    """All of these bytes to this place; on several threads at once if need be."""
    # The system may take less than it is given, for example the last bytes of a full disk.
    while left:
        taken = os.pwrite(descriptor, left, offset)
        left, offset = left[taken:], offset + taken


def bytes_of(part: Tensor) -> memoryview:
    """The tensor's bytes, in order, without a copy where it is contiguous."""
    return part.contiguous().reshape(-1).view(torch.uint8).numpy().data


def in_file_order(tensors: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Widest elements first, then by name: each tensor then begins at a multiple of its element's size."""
    return tuple(sorted(tensors, key=lambda tensor: (-_element_bits(tensor), tensor.name)))


def header_bytes(tensors: Sequence[TensorSpec], *, metadata: Mapping[str, str] = _NO_METADATA) -> bytes:
    """The front of a file with these tensors in this order: length, JSON, spaces up to a multiple of 8."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
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


def plan_shards(
    groups: Iterable[Sequence[TensorSpec]],
    *,
    limit_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] = _NO_METADATA,
) -> tuple[OutputFile, ...]:
    """Groups of tensors (a weight and its scales) in order, no group torn apart, each file filled up to the limit.

    Each file has the `metadata`.
    """
    files: list[list[TensorSpec]] = [[]]
    for group in groups:
        if files[-1] and _nbytes(files[-1]) + _nbytes(group) > limit_bytes:
            files.append([])
        files[-1].extend(group)
    if len(files) == 1:
        return (safetensors_file(SINGLE, files[0], metadata=metadata),)
    names = (f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1))
    return tuple(safetensors_file(name, tensors, metadata=metadata) for name, tensors in zip(names, files, strict=True))


def index_of(files: Sequence[OutputFile]) -> dict[str, Any] | None:
    """The index of a sharded model; a model of one file has none."""
    if len(files) == 1:
        return None
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(_nbytes(file.tensors) for file in files)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _nbytes(tensors: Iterable[TensorSpec]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _element_bits(tensor: TensorSpec) -> int:
    return DTYPES[SAFETENSORS_CODES[tensor.dtype]][1]
