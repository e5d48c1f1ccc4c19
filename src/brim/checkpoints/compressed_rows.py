"""INT8, INT4, FP8 E4M3 and MXFP4 as compressed-tensors holds them: what becomes of each tensor, and config.json."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from brim.checkpoints.conversion import Conversion, Integers, keep
from brim.checkpoints.float_rows import WORK_BYTES as FLOAT_WORK_BYTES
from brim.checkpoints.float_rows import encode_float_rows
from brim.checkpoints.integer_rows import encode_rows
from brim.checkpoints.layouts import float_quantized, int_quantized, mxfp4_packed, pack_quantized
from brim.checkpoints.linears import find_linears, float_matrices
from brim.checkpoints.mixture import KEPT, Mixture
from brim.checkpoints.mx_rows import WORK_BYTES as MX_WORK_BYTES
from brim.checkpoints.mx_rows import encode_mxfp4
from brim.checkpoints.packed_rows import WORK_BYTES, encode_packed
from brim.checkpoints.searched_rows import WORK_BYTES as SEARCH_WORK_BYTES
from brim.checkpoints.searched_rows import encode_searched, unpacked
from brim.checkpoints.targets import ScaleChoice
from brim.errors import UsageError
from brim.models.directory import StoredTensor
from brim.models.spec import ModelSpec
from brim.numerics.encode import TORCH_DTYPES
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import Granularity, PerChannel, PerGroup

DEFAULT_GRANULARITY: Mapping[str, Granularity] = {"int8": PerChannel(), "int4": PerGroup(32), "fp8": PerChannel()}


class Planned(NamedTuple):
    """What becomes of a model."""

    conversions: tuple[Conversion, ...]
    config: dict[str, Any]
    layout: str
    metadata: Mapping[str, str] = {}
    """Of each file."""


def plan_integers(
    spec: ModelSpec,
    stored: Sequence[StoredTensor],
    config: Mapping[str, Any],
    to: str,
    *,
    granularity: Granularity | None,
    scales: ScaleChoice,
    mixture: Mixture,
) -> Planned:
    """INT8, INT4 or a mixture of them; `granularity` None: each format's default. Of INT8 by channel alone the layout
    is the one that most readers know."""
    linears = find_linears(spec, tensors=float_matrices(stored))
    assigned = mixture.assigned(linears.weights, to=to)
    shared = {name: granularity or default for name, default in DEFAULT_GRANULARITY.items()}
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
        return Planned(conversions, int_quantized.config(config, ignore=left_alone), int_quantized.LAYOUT)
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
    return Planned(conversions, dict(config) | {"quantization_config": settings}, pack_quantized.LAYOUT)


def plan_fp8(spec: ModelSpec, stored: Sequence[StoredTensor], config: Mapping[str, Any]) -> Planned:
    """FP8 E4M3 with a scale per channel."""
    linears = find_linears(spec, tensors=float_matrices(stored))
    conversions = tuple(_to_fp8(tensor) if tensor.spec.name in linears.weights else keep(tensor) for tensor in stored)
    return Planned(conversions, float_quantized.config(config, ignore=linears.left_alone), float_quantized.LAYOUT)


def plan_mxfp4(spec: ModelSpec, stored: Sequence[StoredTensor], config: Mapping[str, Any]) -> Planned:
    """MXFP4; linear modules whose rows are no whole blocks are left alone."""
    linears = find_linears(spec, tensors=float_matrices(stored), row_multiple=mxfp4_packed.BLOCK)
    conversions = tuple(_to_mxfp4(tensor) if tensor.spec.name in linears.weights else keep(tensor) for tensor in stored)
    return Planned(conversions, mxfp4_packed.config(config, ignore=linears.left_alone), mxfp4_packed.LAYOUT)


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
        encode=partial(encode_float_rows, format=elements.dtype, scale_dtype=scale_dtype),
        row_elements=inputs,
        row_bytes=(inputs, scale_dtype.itemsize),
        work_bytes=FLOAT_WORK_BYTES,
    )


def _to_mxfp4(tensor: StoredTensor) -> Conversion:
    codes, scale = mxfp4_packed.outputs(tensor.spec)
    return Conversion(
        source=tensor,
        outputs=(codes, scale),
        encode=encode_mxfp4,
        row_elements=tensor.spec.shape[1],
        row_bytes=(codes.shape[1], scale.shape[1]),
        work_bytes=MX_WORK_BYTES,
        format=mxfp4_packed.FORMAT,
    )
