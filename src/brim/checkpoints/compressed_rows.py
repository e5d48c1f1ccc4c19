"""INT8, INT4, FP8 E4M3 and MXFP4 as compressed-tensors holds them: what becomes of each tensor, and config.json."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from brim.checkpoints.between_rows import WORK_BYTES as BETWEEN_WORK_BYTES
from brim.checkpoints.between_rows import encode_packed_between
from brim.checkpoints.conversion import Conversion, Encoded, Integers, keep
from brim.checkpoints.experts import find_weights
from brim.checkpoints.float_rows import WORK_BYTES as FLOAT_WORK_BYTES
from brim.checkpoints.float_rows import encode_float_rows, encode_float_shared
from brim.checkpoints.integer_rows import BLOCKS_AT_ONCE, encode_rows
from brim.checkpoints.integer_rows import WORK_BYTES as ROW_WORK_BYTES
from brim.checkpoints.layouts import float_quantized, int_quantized, mxfp4_packed, pack_quantized
from brim.checkpoints.mixture import KEPT, Mixture
from brim.checkpoints.mx_rows import WORK_BYTES as MX_WORK_BYTES
from brim.checkpoints.mx_rows import encode_mxfp4
from brim.checkpoints.packed_rows import WORK_BYTES, encode_packed
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.searched_rows import WORK_BYTES as SEARCH_WORK_BYTES
from brim.checkpoints.searched_rows import encode_searched, unpacked
from brim.checkpoints.shared_rows import WORK_BYTES as SHARED_WORK_BYTES
from brim.checkpoints.shared_rows import encode_shared
from brim.checkpoints.targets import ScaleChoice
from brim.checkpoints.writer import bytes_of
from brim.errors import UsageError
from brim.models.directory import StoredTensor
from brim.models.spec import ModelSpec, TensorSpec
from brim.numerics.encode import TORCH_DTYPES, storable_scale
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor, granularity_name

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
    symmetric: bool,
    mixture: Mixture,
) -> Planned:
    """INT8, INT4 or a mixture of them; `granularity` None: each format's default.

    Of symmetric INT8 by channel or tensor alone the layout is the one that most readers know.
    """
    stored, linears, experts = find_weights(spec, stored)
    assigned = mixture.assigned(linears.weights, to=to)
    shared = {name: granularity or default for name, default in DEFAULT_GRANULARITY.items()}
    formats = sorted(set(assigned.values()) - {KEPT})
    if experts:
        _check_experts(spec, {assigned[name] for name in experts}, formats, symmetric=symmetric)
    # Experts are read packed alone (transformers 5.23, CompressedTensorsDequantize).
    by_row = formats == ["int8"] and not isinstance(shared["int8"], PerGroup) and symmetric and not experts
    convert = _to_int8 if by_row else _to_packed if symmetric else _to_packed_between
    conversions = tuple(
        keep(tensor)
        if (format := assigned.get(tensor.spec.name, KEPT)) == KEPT
        else convert(tensor, to=format, granularity=shared[format], scales=scales)
        for tensor in stored
    )
    kept = [linears.modules[name] for name, format in assigned.items() if format == KEPT]
    left_alone = sorted([*linears.left_alone, *kept])
    if by_row:
        settings = int_quantized.config(config, ignore=left_alone, strategy=granularity_name(shared["int8"]))
        return Planned(conversions, settings, int_quantized.LAYOUT)
    if len(formats) > 1 and spec.is_encoder_decoder:
        raise UsageError(
            f"{spec.name}: transformers reads {' beside '.join(formats)} in decoders alone; {spec.model_type} is an "
            "encoder with a decoder; use one format, with --keep if need be"
        )
    if len(formats) > 1 and not symmetric:
        raise UsageError("transformers reads zero points of one format alone; leave --asymmetric or the mixture away")
    groups = [
        pack_quantized.Group(
            FORMATS[format].element_bits,
            granularity_name(shared[format]),
            tuple(sorted(linears.modules[name] for name in assigned if assigned[name] == format))
            if len(formats) > 1
            else ("Linear",),
            symmetric,
        )
        for format in formats
    ]
    settings = {"quantization_config": pack_quantized.config_of(groups, ignore=left_alone)}
    return Planned(conversions, dict(config) | settings, pack_quantized.LAYOUT)


def _check_experts(spec: ModelSpec, theirs: set[str], formats: Sequence[str], *, symmetric: bool) -> None:
    if len(formats) > 1 or KEPT in theirs or not symmetric:
        raise UsageError(
            f"{spec.name}: transformers reads all experts in one format with all else, without zero points; "
            "leave --keep of experts, --format, --budget and --asymmetric away"
        )


def plan_fp8(
    spec: ModelSpec, stored: Sequence[StoredTensor], config: Mapping[str, Any], *, granularity: Granularity | None
) -> Planned:
    """FP8 E4M3 with a scale per channel (None) or tensor."""
    stored, linears, _ = find_weights(spec, stored)
    how = granularity or DEFAULT_GRANULARITY["fp8"]
    conversions = tuple(
        _to_fp8(tensor, granularity=how) if tensor.spec.name in linears.weights else keep(tensor) for tensor in stored
    )
    settings = float_quantized.config(config, ignore=linears.left_alone, strategy=granularity_name(how))
    return Planned(conversions, settings, float_quantized.LAYOUT)


def plan_mxfp4(spec: ModelSpec, stored: Sequence[StoredTensor], config: Mapping[str, Any]) -> Planned:
    """MXFP4; linear modules whose rows are no whole blocks are left alone."""
    stored, linears, _ = find_weights(spec, stored, row_multiple=mxfp4_packed.BLOCK)
    conversions = tuple(_to_mxfp4(tensor) if tensor.spec.name in linears.weights else keep(tensor) for tensor in stored)
    return Planned(conversions, mxfp4_packed.config(config, ignore=linears.left_alone), mxfp4_packed.LAYOUT)


def _to_int8(tensor: StoredTensor, *, to: str, granularity: Granularity, scales: ScaleChoice) -> Conversion:
    codes, scale = int_quantized.outputs(tensor.spec, granularity=granularity)
    inputs, scale_dtype = tensor.spec.shape[1], TORCH_DTYPES[scale.dtype]
    if isinstance(granularity, PerTensor):
        shared = partial(encode_shared, format=to, finish=unpacked)
        return _with_one_scale(tensor, codes, scale, encode=shared, format=to)
    searched = partial(encode_searched, format=to, granularity=granularity, scale_dtype=scale_dtype, finish=unpacked)
    return Conversion(
        source=tensor,
        outputs=(codes, scale),
        encode=partial(encode_rows, scale_dtype=scale_dtype) if scales == "absmax" else searched,
        row_elements=inputs,
        row_bytes=(inputs, scale_dtype.itemsize),
        work_bytes=ROW_WORK_BYTES if scales == "absmax" else SEARCH_WORK_BYTES,
        blocks_at_once=BLOCKS_AT_ONCE if scales == "absmax" else 1,
        integers=Integers(to, granularity, scale_dtype, unpacked),
    )


def _with_one_scale(
    tensor: StoredTensor,
    codes: TensorSpec,
    scale: TensorSpec,
    *,
    encode: Callable[..., Encoded],
    format: str,
    constants: tuple[tuple[TensorSpec, bytes], ...] = (),
) -> Conversion:
    """Open until the tensor's bounds are known."""

    def by_bounds(least: float, greatest: float) -> Conversion:
        top, largest = torch.tensor([max(-least, greatest)], dtype=torch.float32), FORMATS[format].largest
        stored = storable_scale(top / largest, largest_code=largest, dtype=TORCH_DTYPES[scale.dtype])
        known = (*constants, (scale, bytes(bytes_of(stored))))
        return replace(conversion, encode=partial(encode, scale=stored), constants=known, by_bounds=None)

    conversion = Conversion(
        source=tensor,
        outputs=(codes,),
        encode=_not_yet,
        row_elements=tensor.spec.shape[1],
        row_bytes=(codes.nbytes // tensor.spec.shape[0],),
        work_bytes=SHARED_WORK_BYTES,
        constants=(*constants, (scale, b"")),
        format=format,
        by_bounds=by_bounds,
    )
    return conversion


def _not_yet(block_RK: Tensor, scratch: Scratch) -> Encoded:
    raise AssertionError("encoded before its scale was known")


def _to_packed(tensor: StoredTensor, *, to: str, granularity: Granularity, scales: ScaleChoice) -> Conversion:
    _check_groups(tensor.spec, granularity)
    words, scale = pack_quantized.outputs(tensor.spec, format=to, granularity=granularity)
    scale_dtype, shape = TORCH_DTYPES[scale.dtype], pack_quantized.shape_tensor(tensor.spec)
    finish = partial(pack_quantized.pack, bits=FORMATS[to].element_bits)
    if isinstance(granularity, PerTensor):
        shared = partial(encode_shared, format=to, finish=finish)
        return _with_one_scale(tensor, words, scale, encode=shared, format=to, constants=(shape,))
    nearest = partial(encode_packed, format=to, granularity=granularity, scale_dtype=scale_dtype)
    searched = partial(encode_searched, format=to, granularity=granularity, scale_dtype=scale_dtype, finish=finish)
    return Conversion(
        source=tensor,
        outputs=(words, scale),
        encode=nearest if scales == "absmax" else searched,
        row_elements=tensor.spec.shape[1],
        row_bytes=(words.nbytes // words.shape[0], scale.nbytes // scale.shape[0]),
        work_bytes=WORK_BYTES if scales == "absmax" else SEARCH_WORK_BYTES,
        blocks_at_once=BLOCKS_AT_ONCE if scales == "absmax" else 1,
        constants=(shape,),
        format=to,
        integers=Integers(to, granularity, scale_dtype, finish),
    )


def _to_packed_between(tensor: StoredTensor, *, to: str, granularity: Granularity, scales: ScaleChoice) -> Conversion:
    """With zero points; their scales are those of the least and greatest element."""
    assert scales == "absmax", scales
    _check_groups(tensor.spec, granularity)
    words, scale = pack_quantized.outputs(tensor.spec, format=to, granularity=granularity)
    zeros = pack_quantized.zeros_output(tensor.spec, format=to, granularity=granularity)
    scale_dtype, together = TORCH_DTYPES[scale.dtype], 32 // FORMATS[to].element_bits
    return Conversion(
        source=tensor,
        outputs=(words, scale, zeros),
        encode=partial(encode_packed_between, format=to, granularity=granularity, scale_dtype=scale_dtype),
        row_elements=tensor.spec.shape[1],
        row_bytes=(
            together * words.nbytes // words.shape[0],
            together * scale.nbytes // scale.shape[0],
            zeros.nbytes // zeros.shape[0],
        ),
        rows_together=together,
        work_bytes=BETWEEN_WORK_BYTES,
        constants=(pack_quantized.shape_tensor(tensor.spec),),
        format=to,
    )


def _check_groups(weight: TensorSpec, granularity: Granularity) -> None:
    inputs = weight.shape[1]
    if not isinstance(granularity, PerGroup) or inputs % granularity.size == 0:
        return
    fitting = min(128, inputs & -inputs)
    fit = f"--granularity group:{fitting}" if fitting >= 8 else "--granularity channel"
    raise UsageError(
        f"tensor {weight.name!r}: rows of {inputs} elements do not divide into groups of {granularity.size}; use {fit}"
    )


def _to_fp8(tensor: StoredTensor, *, granularity: Granularity) -> Conversion:
    elements, scale = float_quantized.outputs(tensor.spec, granularity=granularity)
    if isinstance(granularity, PerTensor):
        shared = partial(encode_float_shared, format=elements.dtype)
        return _with_one_scale(tensor, elements, scale, encode=shared, format=elements.dtype)
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
