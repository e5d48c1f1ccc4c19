"""Plain layout: every float tensor in one format, as `save_pretrained` writes it."""

from collections.abc import Mapping
from typing import Any

from brim.models.spec import TensorSpec
from brim.numerics.formats import FORMATS

TORCH_NAMES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""How config.json spells formats."""


def outputs(tensor: TensorSpec, *, to: str) -> tuple[TensorSpec, ...]:
    """What this tensor becomes."""
    nbytes = FORMATS[to].nbytes(tensor.numel)
    return (TensorSpec(name=tensor.name, shape=tensor.shape, dtype=to, nbytes=nbytes),)


def config(source: Mapping[str, Any], *, to: str) -> dict[str, Any]:
    """config.json of the result: it names the dtype that `dtype="auto"` loads; the older key for it goes."""
    kept = {key: value for key, value in source.items() if key not in ("dtype", "torch_dtype")}
    return kept | {"dtype": TORCH_NAMES[to]}
