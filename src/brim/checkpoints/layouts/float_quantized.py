"""compressed-tensors' `float-quantized` layout: linear weights in FP8 E4M3, a scale per output channel.

A linear module P holds `P.weight`, FP8 (out, in), and `P.weight_scale`, (out, 1) or, for the whole tensor, (1,), in the
dtype the weight had.
Read by transformers, vLLM (on GPUs) and llama.cpp's converter; config keys as of compressed-tensors 0.20.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from brim.checkpoints.layouts import int_quantized
from brim.models.spec import TensorSpec
from brim.numerics.granularity import Granularity

LAYOUT = "float-quantized"
FORMAT = "fp8_e4m3"


def outputs(weight: TensorSpec, *, granularity: Granularity) -> tuple[TensorSpec, TensorSpec]:
    """Elements and scales of a linear weight: of the shapes and sizes that INT8 has."""
    codes, scale = int_quantized.outputs(weight, granularity=granularity)
    return TensorSpec(name=codes.name, shape=codes.shape, dtype=FORMAT, nbytes=codes.nbytes), scale


def config(source: Mapping[str, Any], *, ignore: Sequence[str], strategy: str) -> dict[str, Any]:
    """config.json of the result; `ignore` names every linear module that was left alone; `strategy`: of scales."""
    base = int_quantized.config(source, ignore=ignore, strategy=strategy)
    settings = base["quantization_config"]
    group = settings["config_groups"]["group_0"] | {"format": LAYOUT}
    for part in ("weights", "input_activations"):
        group[part] = group[part] | {"type": "float"}
    return base | {"quantization_config": settings | {"format": LAYOUT, "config_groups": {"group_0": group}}}
