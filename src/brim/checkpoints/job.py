"""`plan_job`: what becomes of each tensor of a model, from headers alone, and the files that this makes."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from brim.checkpoints.bitsandbytes_rows import plan_bitsandbytes
from brim.checkpoints.conversion import Conversion, Integers, cast, keep
from brim.checkpoints.float_rows import WORK_BYTES as FLOAT_WORK_BYTES
from brim.checkpoints.float_rows import encode_float_rows
from brim.checkpoints.gguf_rows import plan_gguf
from brim.checkpoints.integer_rows import encode_rows
from brim.checkpoints.layouts import bitsandbytes, float_quantized, gguf, int_quantized, pack_quantized, plain, torchao
from brim.checkpoints.linears import find_linears
from brim.checkpoints.mixture import KEPT, MIXED, NO_MIXTURE, Mixture
from brim.checkpoints.packed_rows import WORK_BYTES, encode_packed
from brim.checkpoints.searched_rows import WORK_BYTES as SEARCH_WORK_BYTES
from brim.checkpoints.searched_rows import encode_searched, unpacked
from brim.checkpoints.targets import Family, ScaleChoice, Target, checked_layout
from brim.checkpoints.writer import OutputFile, index_of, plan_shards
from brim.errors import UsageError
from brim.models.directory import INDEX, StoredTensor, checked_file
from brim.models.files import read_json_object
from brim.models.spec import ModelSpec, TensorSpec
from brim.numerics.encode import TORCH_DTYPES
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor

_DEFAULT_GRANULARITY: Mapping[str, Granularity] = {"int8": PerChannel(), "int4": PerGroup(32), "fp8": PerChannel()}
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


def plan_job(
    source: Path,
    spec: ModelSpec,
    stored: Sequence[StoredTensor],
    to: Target,
    *,
    granularity: Granularity | None = None,
    layout: Family | None = None,
    scales: ScaleChoice = "absmax",
    mixture: Mixture = NO_MIXTURE,
) -> Job:
    """Raises UsageError for a source that is quantized already, in which nothing would change, or whose rows the
    granularity does not suit (None: INT8 by channel, INT4 by groups of 32), a layout that does not hold the format."""
    config = read_json_object(checked_file(source, CONFIG))
    if not stored:
        raise UsageError(f"{source} has a config.json but no weights; copy its safetensors files beside it")
    _check_unquantized(source, config, stored)
    family = checked_layout(to, layout)
    given, granularity = granularity, _checked_granularity(to, granularity)
    _check_scales(to, scales)
    _check_mixture(to, family, mixture)
    metadata: dict[str, str] = {}
    if family in ("bitsandbytes", "torchao") and (scales != "absmax" or isinstance(granularity, PerGroup)):
        raise UsageError(f"{family}'s INT8 has absmax scales by channel here; leave --scales and --granularity away")
    if family == "gguf":
        conversions, file = plan_gguf(source, spec, config, stored, to=to)
        return Job(conversions, (file,), {}, gguf.LAYOUT, settings=f"{to} {gguf.LAYOUT}")
    if family == "bitsandbytes":
        conversions, config = plan_bitsandbytes(spec, config, stored, to=to)
        name = bitsandbytes.LAYOUT
    elif family == "torchao":
        conversions, config, metadata = _to_torchao(spec, stored, config)
        name = torchao.LAYOUT
    elif granularity is not None:
        conversions, config, name = _to_integers(spec, stored, config, to, granularity, scales, mixture, given)
    else:
        conversions = tuple(_to_float(tensor, to) for tensor in stored)
        config, name = plain.config(config, to=to), "plain"
    if all(c.outputs == (c.source.spec,) and c.source.path.suffix == ".safetensors" for c in conversions):
        raise UsageError(f"{source} has {_nothing(spec, to)}")
    files = plan_shards([conversion.tensors for conversion in conversions], metadata=metadata)
    texts = {CONFIG: as_json(config)}
    if index := index_of(files):
        texts[INDEX] = as_json(index)
    return Job(conversions, files, texts, name, settings=f"{to} {name} {granularity} {scales} {mixture}")


def _checked_granularity(to: Target, granularity: Granularity | None) -> Granularity | None:
    """Of the integers; None for floats."""
    if to not in _DEFAULT_GRANULARITY:
        if granularity is not None:
            raise UsageError(f"--to {to} leaves no choice of granularity, so it has no effect; leave it away")
        return None
    if isinstance(granularity, PerTensor):
        # A block is encoded when it is read; a scale for the whole tensor would take reading it twice, for less.
        raise UsageError("granularity tensor is less exact than channel and no smaller to speak of; use channel")
    return granularity or _DEFAULT_GRANULARITY[to]


def _check_scales(to: Target, scales: ScaleChoice) -> None:
    if scales != "absmax" and to not in ("int8", "int4"):
        raise UsageError(f"--scales {scales} is for integers, and --to is {to}; leave it away, or use int8 or int4")


def _check_mixture(to: Target, family: Family, mixture: Mixture) -> None:
    if mixture and (family != "compressed-tensors" or to not in MIXED):
        raise UsageError(
            f"--keep, --format and --budget are for {' and '.join(MIXED)} of compressed-tensors; leave them out, or "
            f"use --to {MIXED[-1]}"
        )


def _to_integers(
    spec: ModelSpec,
    stored: Sequence[StoredTensor],
    config: Mapping[str, Any],
    to: str,
    granularity: Granularity,
    scales: ScaleChoice,
    mixture: Mixture,
    given: Granularity | None,
) -> tuple[tuple[Conversion, ...], dict[str, Any], str]:
    """Conversions, config.json and layout: of INT8 by channel alone the one that most readers know. `given` is the
    granularity that was asked for, of all formats of a mixture."""
    linears = find_linears(spec, tensors=[tensor.spec.name for tensor in stored if _is_float_matrix(tensor.spec)])
    if to == "fp8":
        if not isinstance(granularity, PerChannel):
            raise UsageError("FP8 has a scale per channel in the layout that readers know; leave --granularity away")
        conversions = tuple(
            _to_fp8(tensor) if tensor.spec.name in linears.weights else keep(tensor) for tensor in stored
        )
        return conversions, float_quantized.config(config, ignore=linears.left_alone), float_quantized.LAYOUT
    assigned = mixture.assigned(linears.weights, to=to)
    shared = {name: granularity if name == to else given or default for name, default in _DEFAULT_GRANULARITY.items()}
    formats = sorted(set(assigned.values()) - {KEPT})
    by_row = formats == ["int8"] and isinstance(shared["int8"], PerChannel)
    convert = _to_int8 if by_row else _to_packed
    conversions = tuple(
        keep(tensor)
        if (format := assigned.get(tensor.spec.name, KEPT)) == KEPT
        else convert(tensor, to=format, granularity=shared[format], scales=scales)
        for tensor in stored
    )
    kept = [linears.modules[name] for name, format in assigned.items() if format == KEPT]
    left_alone = sorted([*linears.left_alone, *kept])
    if by_row:
        return conversions, int_quantized.config(config, ignore=left_alone), int_quantized.LAYOUT
    if len(formats) > 1 and spec.is_encoder_decoder:
        raise UsageError(
            f"{spec.name}: transformers reads {' beside '.join(formats)} in decoders alone; {spec.model_type} is an "
            "encoder with a decoder; use one format, with --keep if need be"
        )
    groups = [
        pack_quantized.Group(
            FORMATS[format].element_bits,
            f"group:{how.size}" if isinstance(how := shared[format], PerGroup) else "channel",
            tuple(sorted(linears.modules[name] for name in assigned if assigned[name] == format))
            if len(formats) > 1
            else ("Linear",),
        )
        for format in formats
    ]
    settings = pack_quantized.config_of(groups, ignore=left_alone)
    return conversions, dict(config) | {"quantization_config": settings}, pack_quantized.LAYOUT


def as_json(value: Mapping[str, Any]) -> str:
    """As a file has it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _nothing(spec: ModelSpec, to: str) -> str:
    if to in _DEFAULT_GRANULARITY:
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
    if tensor.spec.dtype not in _FLOATS or tensor.spec.dtype == to:
        return keep(tensor)
    return cast(tensor, *plain.outputs(tensor.spec, to=to))


def _is_float_matrix(tensor: TensorSpec) -> bool:
    return tensor.dtype in _FLOATS and len(tensor.shape) == 2 and tensor.numel > 0


def _to_int8(tensor: StoredTensor, *, to: str, granularity: Granularity, scales: ScaleChoice) -> Conversion:
    codes, scale = int_quantized.outputs(tensor.spec)
    inputs, scale_dtype = tensor.spec.shape[1], TORCH_DTYPES[scale.dtype]
    searched = partial(encode_searched, format=to, granularity=granularity, scale_dtype=scale_dtype, finish=unpacked)
    return Conversion(
        source=tensor,
        outputs=(codes, scale),
        encode=partial(encode_rows, scale_dtype=scale_dtype) if scales == "absmax" else searched,
        row_elements=inputs,
        row_bytes=(inputs, scale_dtype.itemsize),
        work_bytes=16 if scales == "absmax" else SEARCH_WORK_BYTES,
        integers=Integers(to, granularity, scale_dtype, unpacked),
    )


def _to_torchao(
    spec: ModelSpec, stored: Sequence[StoredTensor], config: Mapping[str, Any]
) -> tuple[tuple[Conversion, ...], dict[str, Any], dict[str, str]]:
    """Conversions, config.json and the files' metadata."""
    linears = find_linears(spec, tensors=[tensor.spec.name for tensor in stored if _is_float_matrix(tensor.spec)])
    conversions = tuple(_to_int8_tensor(t) if t.spec.name in linears.weights else keep(t) for t in stored)
    metadata = torchao.metadata([tensor.spec for tensor in stored], linears.weights)
    return conversions, torchao.config(config, ignore=linears.left_alone), metadata


def _to_int8_tensor(tensor: StoredTensor) -> Conversion:
    codes, scale = torchao.outputs(tensor.spec)
    scale_dtype = TORCH_DTYPES[scale.dtype]
    return Conversion(
        source=tensor,
        outputs=(codes, scale),
        encode=partial(encode_rows, scale_dtype=scale_dtype),
        row_elements=tensor.spec.shape[1],
        row_bytes=(tensor.spec.shape[1], scale_dtype.itemsize),
        constants=(torchao.zero_points(tensor.spec),),
    )


def _to_packed(tensor: StoredTensor, *, to: str, granularity: Granularity, scales: ScaleChoice) -> Conversion:
    inputs = tensor.spec.shape[1]
    if isinstance(granularity, PerGroup) and inputs % granularity.size:
        fitting = min(128, inputs & -inputs)
        fit = f"--granularity group:{fitting}" if fitting >= 8 else "--granularity channel"
        raise UsageError(
            f"tensor {tensor.spec.name!r}: rows of {inputs} elements do not divide into groups of {granularity.size}; "
            f"use {fit}"
        )
    words, scale = pack_quantized.outputs(tensor.spec, format=to, granularity=granularity)
    scale_dtype = TORCH_DTYPES[scale.dtype]
    finish = partial(pack_quantized.pack, bits=FORMATS[to].element_bits)
    nearest = partial(encode_packed, format=to, granularity=granularity, scale_dtype=scale_dtype)
    searched = partial(encode_searched, format=to, granularity=granularity, scale_dtype=scale_dtype, finish=finish)
    return Conversion(
        source=tensor,
        outputs=(words, scale),
        encode=nearest if scales == "absmax" else searched,
        row_elements=inputs,
        row_bytes=(words.nbytes // words.shape[0], scale.nbytes // scale.shape[0]),
        work_bytes=WORK_BYTES if scales == "absmax" else SEARCH_WORK_BYTES,
        constants=(pack_quantized.shape_tensor(tensor.spec),),
        format=to,
        integers=Integers(to, granularity, scale_dtype, finish),
    )


def _to_fp8(tensor: StoredTensor) -> Conversion:
    elements, scale = float_quantized.outputs(tensor.spec)
    inputs, scale_dtype = tensor.spec.shape[1], TORCH_DTYPES[scale.dtype]
    return Conversion(
        source=tensor,
        outputs=(elements, scale),
        encode=partial(encode_float_rows, scale_dtype=scale_dtype),
        row_elements=inputs,
        row_bytes=(inputs, scale_dtype.itemsize),
        work_bytes=FLOAT_WORK_BYTES,
    )
