"""`plan_job`: what becomes of each tensor of a model, from headers alone, and the files that this makes."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from brim.checkpoints.conversion import Conversion, cast, keep
from brim.checkpoints.integer_rows import encode_rows
from brim.checkpoints.layouts import int_quantized, plain
from brim.checkpoints.linears import find_linears
from brim.checkpoints.writer import OutputFile, index_of, plan_shards
from brim.errors import UsageError
from brim.models.directory import INDEX, StoredTensor, checked_file, stored_tensors
from brim.models.files import read_json_object
from brim.models.spec import ModelSpec, TensorSpec
from brim.numerics.encode import TORCH_DTYPES

Target = Literal["fp16", "bf16", "int8"]
CONFIG = "config.json"
_FLOATS = ("fp64", "fp32", "fp16", "bf16")


class Job(NamedTuple):
    """All that a conversion writes, but for the weights' bytes."""

    conversions: tuple[Conversion, ...]
    files: tuple[OutputFile, ...]
    texts: Mapping[str, str]
    """Name -> content of each file beside the weights; config.json for one."""
    layout: str
    settings: str
    """What was asked: a run that was killed is gone on with under the same settings only."""


def plan_job(source: Path, spec: ModelSpec, to: Target) -> Job:
    """Raises UsageError for a source that is quantized already, or in which nothing would change."""
    config = read_json_object(checked_file(source, CONFIG))
    stored = stored_tensors(source)
    if not stored:
        raise UsageError(f"{source} has a config.json but no weights; copy its safetensors files beside it")
    _check_unquantized(source, config, stored)
    if to == "int8":
        linears = find_linears(spec, tensors=[tensor.spec.name for tensor in stored if _is_float_matrix(tensor.spec)])
        conversions = tuple(
            _to_int8(tensor) if tensor.spec.name in linears.weights else keep(tensor) for tensor in stored
        )
        config, layout = int_quantized.config(config, ignore=linears.left_alone), int_quantized.LAYOUT
    else:
        conversions = tuple(_to_float(tensor, to) for tensor in stored)
        config, layout = plain.config(config, to=to), "plain"
    if all(conversion.outputs == (conversion.source.spec,) for conversion in conversions):
        raise UsageError(f"{source} has {_nothing(spec, to)}")
    files = plan_shards(conversion.tensors for conversion in conversions)
    texts = {CONFIG: as_json(config)}
    if index := index_of(files):
        texts[INDEX] = as_json(index)
    return Job(conversions, files, texts, layout, settings=to)


def as_json(value: Mapping[str, Any]) -> str:
    """As a file has it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _nothing(spec: ModelSpec, to: str) -> str:
    if to == "int8":
        # GPT-2's Conv1D modules, for one, hold their weights transposed; readers of INT8 know linear modules alone.
        return (
            "no weight that can become INT8: only those of linear modules (torch.nn.Linear, the head apart) can, and "
            f"{spec.model_type} has none in a float format (Conv1D, as in GPT-2, is none); use --to bf16 or fp16"
        )
    return f"nothing that is not {to.upper()} already, so there is nothing to do"


def _check_unquantized(source: Path, config: Mapping[str, Any], stored: Sequence[StoredTensor]) -> None:
    text = config.get("text_config")
    for facts in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if found := facts.get(key):
                method = found.get("quant_method", "") if isinstance(found, dict) else ""
                raise UsageError(
                    f"{source} is quantized already ({method or key}); quantize the model it was made from"
                )
    names = {tensor.spec.name for tensor in stored}
    suffix = int_quantized.SCALE_SUFFIX
    if scale := next(
        (name for name in sorted(names) if name.endswith(suffix) and name.removesuffix(suffix) in names), ""
    ):
        raise UsageError(f"{source} is quantized already (it holds {scale}); quantize the model it was made from")


def _to_float(tensor: StoredTensor, to: str) -> Conversion:
    if tensor.spec.dtype not in _FLOATS or tensor.spec.dtype == to:
        return keep(tensor)
    return cast(tensor, *plain.outputs(tensor.spec, to=to))


def _is_float_matrix(tensor: TensorSpec) -> bool:
    return tensor.dtype in _FLOATS and len(tensor.shape) == 2 and tensor.numel > 0


def _to_int8(tensor: StoredTensor) -> Conversion:
    codes, scale = int_quantized.outputs(tensor.spec)
    inputs, scale_dtype = tensor.spec.shape[1], TORCH_DTYPES[scale.dtype]
    return Conversion(
        source=tensor,
        outputs=(codes, scale),
        encode=partial(encode_rows, scale_dtype=scale_dtype),
        row_elements=inputs,
        row_bytes=(inputs, scale_dtype.itemsize),
    )
