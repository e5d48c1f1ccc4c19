"""`plan_job`: what becomes of each tensor of a model, from headers alone, and the files that this makes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from brim.checkpoints.bitsandbytes_rows import plan_bitsandbytes
from brim.checkpoints.compressed_rows import DEFAULT_GRANULARITY, Planned, plan_fp8, plan_integers, plan_mxfp4
from brim.checkpoints.conversion import Conversion, cast, keep
from brim.checkpoints.gguf_rows import plan_gguf
from brim.checkpoints.layouts import bitsandbytes, gguf, int_quantized, pack_quantized, plain
from brim.checkpoints.linears import FLOATS
from brim.checkpoints.mixture import MIXED, NO_MIXTURE, Mixture
from brim.checkpoints.targets import Family, ScaleChoice, Target, checked_layout, element_format
from brim.checkpoints.torchao_rows import plan_torchao
from brim.checkpoints.writer import OutputFile, index_of, plan_shards
from brim.errors import UsageError
from brim.models.directory import INDEX, StoredTensor, checked_file
from brim.models.files import read_json_object
from brim.models.spec import ModelSpec
from brim.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor

CONFIG = "config.json"


class Job(NamedTuple):
    """All that a conversion writes, but for the weights' bytes."""

    conversions: tuple[Conversion, ...]
    files: tuple[OutputFile, ...]
    texts: Mapping[str, str]
    """Name -> content of each file beside the weights; config.json for one."""
    to: Target
    layout: str
    settings: str
    """What was asked: a run that was killed is gone on with under the same settings only."""


def plan_job(
    source: Path,
    spec: ModelSpec,
    stored: Sequence[StoredTensor],
    to: Target,
    *,
    granularity: Granularity | None = None,
    layout: Family | None = None,
    scales: ScaleChoice = "absmax",
    symmetric: bool = True,
    mixture: Mixture = NO_MIXTURE,
) -> Job:
    """Raises UsageError for a source that is quantized already, in which nothing would change, or whose rows the
    granularity does not suit (None: INT8 by channel, INT4 by groups of 32), a layout that does not hold the format."""
    config = read_json_object(checked_file(source, CONFIG))
    if not stored:
        raise UsageError(f"{source} has a config.json but no weights; copy its safetensors files beside it")
    _check_unquantized(source, config, stored)
    family = checked_layout(to, layout)
    _check_granularity(to, family, granularity, scales, symmetric)
    _check_scales(to, family, scales)
    _check_symmetric(to, family, scales, symmetric)
    _check_mixture(to, family, mixture)
    if family == "gguf":
        conversions, file = plan_gguf(source, spec, config, stored, to=to)
        return Job(conversions, (file,), {}, to, gguf.LAYOUT, settings=f"{to} {gguf.LAYOUT}")
    if family == "bitsandbytes":
        planned = Planned(*plan_bitsandbytes(spec, config, stored, to=to), bitsandbytes.LAYOUT)
    elif family == "torchao":
        planned = plan_torchao(spec, stored, config, format=element_format(to))
    elif family == "plain":
        conversions = tuple(_to_float(tensor, to) for tensor in stored)
        planned = Planned(conversions, plain.config(config, to=to), "plain")
    elif to == "fp8":
        planned = plan_fp8(spec, stored, config, granularity=granularity)
    elif to == "mxfp4":
        planned = plan_mxfp4(spec, stored, config)
    else:
        planned = plan_integers(
            spec, stored, config, to, granularity=granularity, scales=scales, symmetric=symmetric, mixture=mixture
        )
    conversions, config, name, metadata = planned
    if all(c.outputs == (c.source.spec,) and c.source.path.suffix == ".safetensors" for c in conversions):
        raise UsageError(f"{source} has {_nothing(spec, to)}")
    files = plan_shards([conversion.tensors for conversion in conversions], metadata=metadata)
    texts = {CONFIG: as_json(config)}
    if index := index_of(files):
        texts[INDEX] = as_json(index)
    return Job(
        conversions, files, texts, to, name, settings=f"{to} {name} {granularity} {scales} {symmetric} {mixture}"
    )


def _check_granularity(
    to: Target, family: Family, granularity: Granularity | None, scales: ScaleChoice, symmetric: bool
) -> None:
    if granularity is None:
        return
    if to not in DEFAULT_GRANULARITY:
        raise UsageError(f"--to {to} leaves no choice of granularity, so it has no effect; leave it away")
    if not isinstance(granularity, PerChannel) and family != "compressed-tensors":
        raise UsageError(f"{family}'s {to.upper()} has absmax scales by channel; leave --granularity away")
    if isinstance(granularity, PerGroup) and to == "fp8":
        raise UsageError(
            "FP8 has a scale per channel or tensor in the layout that readers know; leave --granularity away"
        )
    if isinstance(granularity, PerTensor) and (scales != "absmax" or not symmetric):
        raise UsageError("--granularity tensor has absmax scales and no zero points; use channel for others")


def _check_scales(to: Target, family: Family, scales: ScaleChoice) -> None:
    if scales == "absmax":
        return
    if to not in ("int8", "int4"):
        raise UsageError(f"--scales {scales} is for integers, and --to is {to}; leave it away, or use int8 or int4")
    if family != "compressed-tensors":
        raise UsageError(f"{family}'s INT8 has absmax scales by channel here; leave --scales away")


def _check_symmetric(to: Target, family: Family, scales: ScaleChoice, symmetric: bool) -> None:
    if symmetric:
        return
    if to not in ("int8", "int4") or family != "compressed-tensors":
        raise UsageError("--asymmetric is for int8 and int4 of compressed-tensors; leave it away")
    if scales != "absmax":
        raise UsageError(
            f"--asymmetric takes its scales from the least and greatest elements; leave --scales {scales} away"
        )


def _check_mixture(to: Target, family: Family, mixture: Mixture) -> None:
    if mixture and (family != "compressed-tensors" or to not in MIXED):
        raise UsageError(
            f"--keep, --format and --budget are for {' and '.join(MIXED)} of compressed-tensors; leave them out, or "
            f"use --to {MIXED[-1]}"
        )


def as_json(value: Mapping[str, Any]) -> str:
    """As a file has it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _nothing(spec: ModelSpec, to: str) -> str:
    if to not in FLOATS:
        # GPT-2's Conv1D modules, for one, hold their weights transposed; readers of integers know linear modules alone.
        return (
            f"no weight that can become {to.upper()}: only those of linear modules can (torch.nn.Linear, the head "
            f"apart), and {spec.model_type} has none in a float format (Conv1D, as in GPT-2, is none); "
            "use --to bf16 or fp16"
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
    scaled = {name.removesuffix(int_quantized.SCALE_SUFFIX) for name in names if name.endswith("_scale")}
    packed = {name + pack_quantized.PACKED_SUFFIX for name in scaled}
    if found := sorted(names & {name + int_quantized.SCALE_SUFFIX for name in scaled & names} | names & packed):
        raise UsageError(f"{source} is quantized already (it holds {found[0]}); quantize the model it was made from")


def _to_float(tensor: StoredTensor, to: str) -> Conversion:
    if tensor.spec.dtype not in FLOATS or tensor.spec.dtype == to:
        return keep(tensor)
    return cast(tensor, *plain.outputs(tensor.spec, to=to))
