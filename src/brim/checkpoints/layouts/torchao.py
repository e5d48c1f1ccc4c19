"""torchao's layouts of INT8 and FP8, weights only, by output channel: its tensor classes flattened into safetensors.

A linear module P holds `P._weight_qdata`, elements (out, in), `P._weight_scale`, FP32 (out, 1), and, INT8 alone,
`P._weight_zero_point`, zeros (out, 1); no `P.weight`. Each file's `__metadata__` says of which class a tensor is, by
its name in the model. Names and classes as of torchao 0.18: its safetensors form is a prototype.
Read by transformers with torchao, which keeps the elements in memory.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from brim.checkpoints.layouts.plain import TORCH_NAMES
from brim.models.spec import TensorSpec
from brim.numerics.formats import FORMATS

LAYOUT = "torchao"
_TORCH_NAMES = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


def outputs(weight: TensorSpec, *, format: str) -> tuple[TensorSpec, TensorSpec]:
    """Elements, a byte each, and scales of a linear weight."""
    rows = weight.shape[0]
    return (
        TensorSpec(name=_part(weight, "qdata"), shape=weight.shape, dtype=format, nbytes=weight.numel),
        TensorSpec(name=_part(weight, "scale"), shape=(rows, 1), dtype="fp32", nbytes=FORMATS["fp32"].nbytes(rows)),
    )


def zero_points(weight: TensorSpec) -> tuple[TensorSpec, bytes]:
    """One for each scale; none is anything but 0."""
    rows = weight.shape[0]
    return TensorSpec(name=_part(weight, "zero_point"), shape=(rows, 1), dtype="int8", nbytes=rows), bytes(rows)


def metadata(tensors: Iterable[TensorSpec], quantized: Iterable[str], *, format: str) -> dict[str, str]:
    """Of each file: what every tensor of the model is. transformers puts those of all files together."""
    weights, names = set(quantized), list[str]()
    facts = {}
    for tensor in tensors:
        names.append(tensor.name)
        kind = _class_of(tensor, format) if tensor.name in weights else {"_type": "Tensor"}
        facts[tensor.name] = json.dumps(kind)
    return facts | {"tensor_names": json.dumps(names)}


def config(source: Mapping[str, Any], *, format: str, ignore: Sequence[str]) -> dict[str, Any]:
    """config.json of the result; `ignore` names every linear module that was left alone."""
    settings: dict[str, Any] = {
        "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
        "set_inductor_config": True,
    }
    if format == "int8":
        kind = "Int8WeightOnlyConfig"
        settings["group_size"] = None
    else:
        kind = "Float8WeightOnlyConfig"
        settings["weight_dtype"] = {"_type": "torch.dtype", "_data": _TORCH_NAMES[format]}
    return dict(source) | {
        "quantization_config": {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": kind, "_version": 2, "_data": settings}},
            "modules_to_not_convert": list(ignore),
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }
    }


def _class_of(weight: TensorSpec, format: str) -> dict[str, Any]:
    dtype = TORCH_NAMES["fp32" if weight.dtype == "fp64" else weight.dtype]
    facts: dict[str, Any] = {
        "act_quant_kwargs": None,
        "block_size": [1, weight.shape[1]],
        "dtype": {"_type": "torch.dtype", "_data": dtype},
    }
    if format == "int8":
        return {
            "_type": "Int8Tensor",
            "_data": facts | {"reduce_range": False},
            "_tensor_data_names": ["zero_point", "qdata", "scale"],
        }
    kernel = {"_type": "KernelPreference", "_data": "AUTO"}
    return {
        "_type": "Float8Tensor",
        "_data": facts | {"mm_config": None, "kernel_preference": kernel},
        "_tensor_data_names": ["qdata", "scale"],
    }


def _part(weight: TensorSpec, part: str) -> str:
    module, _, name = weight.name.rpartition(".")
    return f"{module}._{name}_{part}"
