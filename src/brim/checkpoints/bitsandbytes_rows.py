"""NF4 and INT8 as bitsandbytes holds them. Shapes: R rows, K elements of a row, N = R * K."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from brim.checkpoints.conversion import Conversion, Encoded, keep
from brim.checkpoints.integer_rows import BLOCKS_AT_ONCE, encode_rows
from brim.checkpoints.layouts import bitsandbytes
from brim.checkpoints.linears import find_linears
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import compare
from brim.errors import UsageError
from brim.models.directory import StoredTensor
from brim.models.spec import ModelSpec
from brim.numerics.encode import TORCH_DTYPES
from brim.numerics.formats import FORMATS

WORK_BYTES = 48
"""For each element: scaled, decoded and error in FP32, the codes as int32, and up to eight bytes for its bits."""
_LAST_CODE = FORMATS["int8"].codes[1]


def plan_bitsandbytes(
    spec: ModelSpec, config: Mapping[str, Any], stored: Sequence[StoredTensor], *, to: str
) -> tuple[tuple[Conversion, ...], dict[str, Any]]:
    """What becomes of each tensor, and config.json. Raises UsageError where there is nothing to quantize."""
    # bitsandbytes 0.50.2 decodes blocks that reach past a row's end by another block's scale on a CPU (layers/packing).
    whole = bitsandbytes.BLOCK if to == "nf4" else 1
    matrices = [tensor.spec.name for tensor in stored if len(tensor.spec.shape) == 2 and tensor.spec.dtype in _FLOATS]
    linears = find_linears(spec, tensors=matrices, row_multiple=whole, of_bitsandbytes=True)
    convert = _to_nf4 if to == "nf4" else _to_int8
    changed = linears.weights | linears.transposed
    conversions = tuple(
        convert(tensor, transposed=tensor.spec.name in linears.transposed)
        if tensor.spec.name in changed
        else keep(tensor)
        for tensor in stored
    )
    if not changed:
        raise UsageError(
            f"{spec.name} has no linear weight for bitsandbytes' {to.upper()}"
            + (f": rows must be multiples of {whole}" if whole > 1 else "")
            + "; use --to bf16 or fp16"
        )
    before = Counter(tensor.spec.dtype for tensor in stored if tensor.spec.name in changed).most_common(1)[0][0]
    return conversions, bitsandbytes.config(config, to=to, dtype=before, ignore=linears.left_alone)


_FLOATS = ("fp64", "fp32", "fp16", "bf16")


def encode_nf4(block_RK: Tensor, scratch: Scratch) -> Encoded:
    """Bytes (N / 2,) and absmax (N / 64,), by bitsandbytes' own operators."""
    values_RK = block_RK.float()
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit(values_RK, bitsandbytes.BLOCK, "nf4", torch.uint8)
    decoded = torch.ops.bitsandbytes.dequantize_4bit(
        codes, absmax, bitsandbytes.BLOCK, "nf4", (1, values_RK.numel()), torch.float32
    )
    sums = compare(block_RK, decoded.view(block_RK.shape), scratch, scale=absmax)
    if block_RK.dtype == torch.float64:
        sums.overflowed = max(sums.overflowed, int(torch.isinf(values_RK).sum()))
    return Encoded((codes, absmax), sums, lambda: decoded.view(block_RK.shape))


def encode_int8(block_RK: Tensor, scratch: Scratch) -> Encoded:
    """Codes (R, K) and 127 times the scales (R,)."""
    encoded = encode_rows(block_RK, scratch, scale_dtype=torch.float32)
    codes_RK, scale_R = encoded.parts
    return Encoded((codes_RK, scale_R.flatten() * _LAST_CODE), encoded.statistics, encoded.decoded)


def _to_nf4(tensor: StoredTensor, *, transposed: bool) -> Conversion:
    weight = replace(tensor.spec, shape=tensor.spec.shape[::-1]) if transposed else tensor.spec
    inputs = weight.shape[1]
    return Conversion(
        source=tensor,
        outputs=bitsandbytes.nf4_outputs(weight),
        encode=encode_nf4,
        row_elements=inputs,
        row_bytes=(inputs // 2, 4 * inputs // bitsandbytes.BLOCK),
        work_bytes=WORK_BYTES,
        constants=bitsandbytes.nf4_constants(weight),
        format="nf4",
        by_column=transposed,
    )


def _to_int8(tensor: StoredTensor, *, transposed: bool) -> Conversion:
    weight = replace(tensor.spec, shape=tensor.spec.shape[::-1]) if transposed else tensor.spec
    return Conversion(
        source=tensor,
        outputs=bitsandbytes.int8_outputs(weight),
        encode=encode_int8,
        row_elements=weight.shape[1],
        row_bytes=(weight.shape[1], TORCH_DTYPES["fp32"].itemsize),
        constants=bitsandbytes.int8_constants(weight),
        blocks_at_once=BLOCKS_AT_ONCE,
        by_column=transposed,
    )
