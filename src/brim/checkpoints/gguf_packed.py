"""A GGUF file's Q8_0 and Q4_0 matrices as safetensors that stay packed in memory: the same codes and scales, cut apart.

Nothing is rounded: a block of 32 elements and its FP16 scale become a group of 32 and its scale. Other blocks (Q6_K, in
which llama.cpp keeps embeddings) become FP32 by gguf-py's arithmetic. Tile by tile, whatever a tensor's size.
Shapes: R rows, K elements of a row, N blocks, B = 32 elements of one.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from brim.checkpoints.layouts.gguf import ARCHITECTURES, Architecture, file_name_of
from brim.checkpoints.layouts.pack_quantized import pack
from brim.checkpoints.reader import opened, read_into
from brim.checkpoints.writer import bytes_of, create, safetensors_file, write_at
from brim.errors import ModelFileError
from brim.models.directory import SINGLE, StoredTensor
from brim.models.gguf_config import config_from_gguf
from brim.models.gguf_header import BLOCKS, GgufHeader, read_gguf_header
from brim.models.quiet import quiet_transformers
from brim.models.skeleton import skeleton
from brim.models.spec import ModelSpec, TensorSpec
from brim.models.weights import check_vocabulary, prepared, write_tokenizer
from brim.numerics.ggml_blocks import BLOCK, BYTES, unpack_blocks
from brim.units import Progress, no_progress

_TILE_BYTES = 2**20
_PLAIN = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NUMBERS = {name: number for number, (name, _, _) in BLOCKS.items()}


class _Part(NamedTuple):
    """What becomes of one tensor of the file."""

    source: StoredTensor
    outputs: tuple[TensorSpec, ...]
    convert: Callable[[Tensor], tuple[Tensor, ...]]
    """Bytes of whole rows -> the outputs' next elements."""
    rows_together: int = 1
    """Heads of queries and keys, whose rows change places."""


def packed_directory(spec: ModelSpec, *, progress: Progress = no_progress) -> Path | None:
    """A directory in the cache with the weights of this GGUF file packed as they are, its config and its tokenizer.

    None where it has no matrices in blocks that stay packed. Raises as `models.weights.local_directory`.
    """
    path = spec.path
    if spec.kind != "gguf" or path is None or spec.model_type not in ARCHITECTURES:
        return None
    header = read_gguf_header(path)
    if not any(entry.spec.dtype in BYTES and ".attn_" in entry.spec.name for entry in header.tensors):
        return None

    def make(directory: Path) -> None:
        config = config_from_gguf(header, where=path)
        check_vocabulary(header, config, path)
        _write_all(_parts(path, header, spec), directory, progress)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with quiet_transformers():
            write_tokenizer(path, directory)

    most_bytes = sum(t.nbytes if t.dtype in BYTES else 4 * t.numel for t in spec.tensors)
    return prepared((path,), path.name, form="-packed", need_bytes=most_bytes, make=make)


def _write_all(parts: Sequence[_Part], directory: Path, progress: Progress) -> None:
    file = safetensors_file(SINGLE, [output for part in parts for output in part.outputs])
    create(directory / SINGLE, file, {})
    descriptor = os.open(directory / SINGLE, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for done, part in enumerate(parts):
            progress(done, len(parts))
            _write(part, descriptor, file.places)
        progress(len(parts), len(parts))
    finally:
        os.close(descriptor)


def _write(part: _Part, descriptor: int, places: Mapping[str, int]) -> None:
    spec = part.source.spec
    rows = spec.shape[0] if len(spec.shape) > 1 else 1
    row_bytes = spec.nbytes // rows
    together = part.rows_together * max(1, _TILE_BYTES // (row_bytes * part.rows_together))
    offsets = [places[output.name] for output in part.outputs]
    with opened(part.source) as reading:
        for first in range(0, rows, together):
            count = min(together, rows - first)
            tile = torch.empty(count, row_bytes, dtype=torch.uint8)
            read_into(reading, bytes_of(tile), first * row_bytes, part.source)
            for number, output in enumerate(part.convert(tile)):
                view = bytes_of(output)
                write_at(descriptor, view, offsets[number])
                offsets[number] += len(view)


def _parts(path: Path, header: GgufHeader, spec: ModelSpec) -> list[_Part]:
    architecture = ARCHITECTURES[spec.model_type]
    with torch.device("meta"), quiet_transformers():
        model = skeleton(spec, dtype="fp32", attention="eager")
    named = file_name_of(architecture, spec.num_layers)
    there = {
        entry.spec.name: StoredTensor(spec=entry.spec, path=path, offset=header.data_start + entry.begin)
        for entry in header.tensors
    }
    packable = {f"{name}.weight" for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Embedding)}
    parts = []
    for name, parameter in model.named_parameters():
        source = there.get(named(name))
        if source is None or source.spec.shape != tuple(parameter.shape):
            raise ModelFileError(f"{path} lacks {named(name)} of {tuple(parameter.shape)}, which its architecture has")
        parts.append(_part(name, source, architecture, spec, packs=name in packable))
    return parts


def _part(name: str, source: StoredTensor, architecture: Architecture, spec: ModelSpec, *, packs: bool) -> _Part:
    shape, format = source.spec.shape, source.spec.dtype
    paired = architecture.paired_rotary and (".q_proj." in name or ".k_proj." in name)
    head = spec.head_dim if paired else 1

    def arranged(tile: Tensor) -> Tensor:
        return _in_halves(tile, head) if paired else tile

    if packs and format in BYTES and len(shape) == 2:
        outputs = _packed_outputs(name, shape, format)
        return _Part(source, outputs, lambda tile: _cut(arranged(tile), format), rows_together=head)
    offset = architecture.norm_offset if "norm" in name else 0.0
    output = TensorSpec(name=name, shape=shape, dtype="fp32", nbytes=4 * source.spec.numel)

    def widened(tile: Tensor) -> tuple[Tensor, ...]:
        values = _decoded(tile, format)
        # a bias of queries or keys is one row here
        flat = values.view(-1, 1) if len(shape) == 1 else values
        return (arranged(flat) - offset,) if offset else (arranged(flat),)

    return _Part(source, (output,), widened, rows_together=head if len(shape) > 1 else 1)


def _packed_outputs(name: str, shape: tuple[int, ...], format: str) -> tuple[TensorSpec, ...]:
    rows, inputs = shape
    groups = inputs // BLOCK
    scale = TensorSpec(name=f"{name}_scale", shape=(rows, groups), dtype="fp16", nbytes=2 * rows * groups)
    if format == "q8_0":
        return TensorSpec(name=name, shape=shape, dtype="int8", nbytes=rows * inputs), scale
    words = TensorSpec(name=f"{name}_packed", shape=(rows, inputs // 8), dtype="int32", nbytes=rows * inputs // 2)
    return words, scale


def _cut(tile: Tensor, format: str) -> tuple[Tensor, ...]:
    rows = tile.shape[0]
    codes_NB, scale_N = unpack_blocks(tile, format=format)
    codes_RK = codes_NB.view(rows, -1)
    return (codes_RK if format == "q8_0" else pack(codes_RK, bits=4)), scale_N


def _decoded(tile: Tensor, format: str) -> Tensor:
    """FP32, a row for each of the tile's."""
    if format in _PLAIN:
        return tile.view(_PLAIN[format]).float()
    kind = gguf.GGMLQuantizationType(_NUMBERS[format])
    values: Any = gguf.dequantize(tile.numpy(), kind)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(tile.shape[0], -1)


def _in_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Of each head the neighbours, which GGUF's readers rotate together, go to places i and i + D/2."""
    pairs = rows.view(-1, head_dim // 2, 2, rows.shape[-1])
    return pairs.transpose(1, 2).reshape(rows.shape)
