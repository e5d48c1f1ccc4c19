"""compressed-tensors' `mxfp4-pack-quantized` layout: OCP MXFP4, FP4 E2M1 elements and a power of two for 32 of a row.

A linear module P holds `P.weight_packed`, uint8 (out, in / 2), the earlier code in the lower half of a byte, a code
being sign, two bits of exponent and one of fraction; and `P.weight_scale`, uint8 (out, in / 32), exponents plus 127
(E8M0). No `P.weight`. Read by transformers and vLLM; config keys as of compressed-tensors 0.20.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from brim.checkpoints.layouts import int_quantized
from brim.models.spec import TensorSpec
from brim.numerics.formats import FORMATS

LAYOUT = "mxfp4-pack-quantized"
FORMAT = "mxfp4"
BLOCK = FORMATS[FORMAT].block


def outputs(weight: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """Codes and exponents of a linear weight whose rows are whole blocks."""
    rows, inputs = weight.shape

    def part(name: str, width: int) -> TensorSpec:
        return TensorSpec(name=f"{weight.name}_{name}", shape=(rows, width), dtype="uint8", nbytes=rows * width)

    return part("packed", inputs // 2), part("scale", inputs // BLOCK)


def config(source: Mapping[str, Any], *, ignore: Sequence[str]) -> dict[str, Any]:
    """config.json of the result; `ignore` names every linear module that was left alone."""
    base = int_quantized.config(source, ignore=ignore)
    settings = base["quantization_config"]
    weights = {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": BLOCK, "dynamic": False,
        "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8",
    }  # fmt: skip
    group = settings["config_groups"]["group_0"] | {"weights": weights, "input_activations": None, "format": LAYOUT}
    return base | {"quantization_config": settings | {"format": LAYOUT, "config_groups": {"group_0": group}}}
