"""torchao's layout of INT8, weights only, by output channel: `Int8Tensor` flattened into safetensors.

A linear module P holds `P._weight_qdata`, codes (out, in), `P._weight_scale`, FP32 (out, 1), and
`P._weight_zero_point`, zeros (out, 1); no `P.weight`. Each file's `__metadata__` says of which class a tensor is, by
its name in the model. Names and classes as of torchao 0.18: its safetensors form is a prototype.
Read by transformers with torchao, which keeps the codes in memory.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from brim.checkpoints.layouts.plain import TORCH_NAMES
from brim.models.spec import TensorSpec
from brim.numerics.formats import FORMATS

LAYOUT = "torchao"


def outputs(weight: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """Codes and scales of a linear weight."""
    rows = weight.shape[0]
    return (
        TensorSpec(name=_part(weight, "qdata"), shape=weight.shape, dtype="int8", nbytes=weight.numel),
        TensorSpec(name=_part(weight, "scale"), shape=(rows, 1), dtype="fp32", nbytes=FORMATS["fp32"].nbytes(rows)),
    )


def zero_points(weight: TensorSpec) -> tuple[TensorSpec, bytes]:
    """One for each scale; none is anything but 0."""
    rows = weight.shape[0]
    return TensorSpec(name=_part(weight, "zero_point"), shape=(rows, 1), dtype="int8", nbytes=rows), bytes(rows)


def metadata(tensors: Iterable[TensorSpec], quantized: Iterable[str]) -> dict[str, str]:
    """Of each file: what every tensor of the model is. transformers puts those of all files together."""
    weights, names = set(quantized), list[str]()
    facts = {}
    for tensor in tensors:
        names.append(tensor.name)
        facts[tensor.name] = json.dumps(_class_of(tensor) if tensor.name in weights else {"_type": "Tensor"})
    return facts | {"tensor_names": json.dumps(names)}


def config(source: Mapping[str, Any], *, ignore: Sequence[str]) -> dict[str, Any]:
    """config.json of the result; `ignore` names every linear module that was left alone."""
    granularity = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    settings = {"granularity": granularity, "group_size": None, "set_inductor_config": True}
    return dict(source) | {
        "quantization_config": {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": settings}},
            "modules_to_not_convert": list(ignore),
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }
    }


def _class_of(weight: TensorSpec) -> dict[str, Any]:
    dtype = TORCH_NAMES["fp32" if weight.dtype == "fp64" else weight.dtype]
    facts = {
        "act_quant_kwargs": None,
        "reduce_range": False,
        "block_size": [1, weight.shape[1]],
        "dtype": {"_type": "torch.dtype", "_data": dtype},
    }
    return {"_type": "Int8Tensor", "_data": facts, "_tensor_data_names": ["zero_point", "qdata", "scale"]}


def _part(weight: TensorSpec, part: str) -> str:
    module, _, name = weight.name.rpartition(".")
    return f"{module}._{name}_{part}"
