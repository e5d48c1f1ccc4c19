"""compressed-tensors' `int-quantized` layout: linear weights in INT8, a scale per output channel, the rest as it was.

A linear module P holds `P.weight`, int8 (out, in), and `P.weight_scale`, (out, 1) or, for a whole tensor, (1,), in the
dtype the weight had: readers cast the scale to the model's dtype, so the codes are made for the scale as it will be.
Everything else, embeddings and head included, keeps its dtype: the only loss is that of the linear weights.
Read by transformers, vLLM and llama.cpp's converter; config keys as of compressed-tensors 0.20.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from brim.models.spec import TensorSpec
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import Granularity, PerChannel

LAYOUT = "int-quantized"
_CHANNEL = PerChannel()
SCALE_SUFFIX = "_scale"


def outputs(weight: TensorSpec, *, granularity: Granularity = _CHANNEL) -> tuple[TensorSpec, TensorSpec]:
    """Codes and scales of a linear weight."""
    rows, inputs = weight.shape
    scale_shape = granularity.scale_shape((rows, inputs))
    scale_format = "fp32" if weight.dtype == "fp64" else weight.dtype
    return (
        TensorSpec(name=weight.name, shape=weight.shape, dtype="int8", nbytes=FORMATS["int8"].nbytes(weight.numel)),
        TensorSpec(
            name=weight.name + SCALE_SUFFIX,
            shape=scale_shape,
            dtype=scale_format,
            nbytes=FORMATS[scale_format].nbytes(scale_shape[0]),
        ),
    )


def config(source: Mapping[str, Any], *, ignore: Sequence[str], strategy: str = "channel") -> dict[str, Any]:
    """config.json of the result; `ignore` names every linear module that was left alone; `strategy`: of scales."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": LAYOUT,
    }
    return dict(source) | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": LAYOUT,
            # Without it transformers takes the codes for weights and says nothing.
            "quantization_status": "compressed",
            # transformers would round activations to 8 bits in floating point, which costs accuracy and saves nothing
            # there; with this it makes plain weights of the codes when it loads. Other readers do not know the key.
            "dequantize": True,
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": list(ignore),
            "config_groups": {"group_0": group},
        }
    }
