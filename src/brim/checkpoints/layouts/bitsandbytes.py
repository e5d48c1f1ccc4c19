"""bitsandbytes' layouts: NF4 in blocks of 64 along a row, and LLM.int8's INT8 with a scale per output channel.

NF4: a module P holds `P.weight`, two codes in a byte (numel / 2, 1), the earlier one in the upper half;
`P.weight.absmax`, FP32 (numel / 64,); `P.weight.quant_map`, the 16 values; and the facts as JSON in bytes,
`P.weight.quant_state.bitsandbytes__nf4`. INT8: `P.weight`, codes (out, in), `P.SCB`, FP32 (out,), 127 times the scale,
and `P.weight_format`, 0 for rows as they are. A Conv1D module (GPT-2) is held transposed, as a linear one.
Read by transformers with bitsandbytes, which keeps the codes in memory; names as of bitsandbytes 0.50.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from brim.checkpoints.layouts.plain import TORCH_NAMES
from brim.models.spec import TensorSpec
from brim.numerics.formats import FORMATS, NF4_GRID

LAYOUT = "bitsandbytes"
BLOCK = FORMATS["nf4"].block


def nf4_outputs(weight: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """Codes and scales; the weight's rows are whole blocks."""
    blocks = weight.numel // BLOCK
    return (
        TensorSpec(name=weight.name, shape=(weight.numel // 2, 1), dtype="uint8", nbytes=weight.numel // 2),
        TensorSpec(name=f"{weight.name}.absmax", shape=(blocks,), dtype="fp32", nbytes=4 * blocks),
    )


def nf4_constants(weight: TensorSpec) -> tuple[tuple[TensorSpec, bytes], ...]:
    """The grid, and what decoding must know; `weight` as a linear module has it."""
    grid = np.array(NF4_GRID, dtype="<f4").tobytes()
    dtype = TORCH_NAMES["fp32" if weight.dtype == "fp64" else weight.dtype]
    facts = json.dumps({"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": list(weight.shape)}).encode()
    state = f"{weight.name}.quant_state.bitsandbytes__nf4"
    return (
        (TensorSpec(name=f"{weight.name}.quant_map", shape=(16,), dtype="fp32", nbytes=len(grid)), grid),
        (TensorSpec(name=state, shape=(len(facts),), dtype="uint8", nbytes=len(facts)), facts),
    )


def int8_outputs(weight: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """Codes and scales."""
    rows = weight.shape[0]
    return (
        TensorSpec(name=weight.name, shape=weight.shape, dtype="int8", nbytes=weight.numel),
        TensorSpec(name=_module(weight) + ".SCB", shape=(rows,), dtype="fp32", nbytes=4 * rows),
    )


def int8_constants(weight: TensorSpec) -> tuple[tuple[TensorSpec, bytes], ...]:
    """That rows lie as they are; there are other orders, for kernels of old."""
    return ((TensorSpec(name=_module(weight) + ".weight_format", shape=(), dtype="uint8", nbytes=1), b"\0"),)


def config(source: Mapping[str, Any], *, to: str, dtype: str, ignore: Sequence[str]) -> dict[str, Any]:
    """config.json of the result; `ignore`: linear modules that were left alone; `dtype`: the weights' before."""
    settings: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": list(ignore)}
    if to == "int8":
        settings |= {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}
    else:
        settings |= {
            "load_in_8bit": False,
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": TORCH_NAMES["fp32" if dtype == "fp64" else dtype],
            "bnb_4bit_quant_storage": "uint8",
        }
    return dict(source) | {"quantization_config": settings}


def _module(weight: TensorSpec) -> str:
    return weight.name.removesuffix(".weight")
