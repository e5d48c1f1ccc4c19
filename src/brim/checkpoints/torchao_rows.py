"""INT8 and FP8 as torchao holds them: what becomes of each tensor, config.json and the files' metadata."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from brim.checkpoints.compressed_rows import Planned
from brim.checkpoints.conversion import Conversion, keep
from brim.checkpoints.float_rows import WORK_BYTES as FLOAT_WORK_BYTES
from brim.checkpoints.float_rows import encode_float_rows
from brim.checkpoints.integer_rows import BLOCKS_AT_ONCE, WORK_BYTES, encode_rows
from brim.checkpoints.layouts import torchao
from brim.checkpoints.linears import find_linears, float_matrices
from brim.models.directory import StoredTensor
from brim.models.spec import ModelSpec
from brim.numerics.encode import TORCH_DTYPES


def plan_torchao(spec: ModelSpec, stored: Sequence[StoredTensor], config: Mapping[str, Any], *, format: str) -> Planned:
    """`format` of the elements: int8, fp8_e4m3 or fp8_e5m2."""
    linears = find_linears(spec, tensors=float_matrices(stored))
    conversions = tuple(
        _converted(tensor, format) if tensor.spec.name in linears.weights else keep(tensor) for tensor in stored
    )
    metadata = torchao.metadata([tensor.spec for tensor in stored], linears.weights, format=format)
    settings = torchao.config(config, format=format, ignore=linears.left_alone)
    return Planned(conversions, settings, torchao.LAYOUT, metadata)


def _converted(tensor: StoredTensor, format: str) -> Conversion:
    elements, scale = torchao.outputs(tensor.spec, format=format)
    scale_dtype = TORCH_DTYPES[scale.dtype]
    integers = format == "int8"
    by_row = partial(encode_rows, scale_dtype=scale_dtype)
    return Conversion(
        source=tensor,
        outputs=(elements, scale),
        encode=by_row if integers else partial(encode_float_rows, format=format, scale_dtype=scale_dtype),
        row_elements=tensor.spec.shape[1],
        row_bytes=(tensor.spec.shape[1], scale_dtype.itemsize),
        work_bytes=WORK_BYTES if integers else FLOAT_WORK_BYTES,
        blocks_at_once=BLOCKS_AT_ONCE if integers else 1,
        constants=(torchao.zero_points(tensor.spec),) if integers else (),
    )
