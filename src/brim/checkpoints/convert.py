"""`quantize`: a model directory into a smaller one, tile by tile, so that memory does not grow with the model.

Every output's name, shape and dtype follows from the source's headers, so disk space is checked and file headers are
written before the first weight is read. What was written is read back and compared before the directory appears.
"""

import errno
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from brim.checkpoints.audit import REPORT_NAME, QuantizationReport, TensorAudit, TensorReport
from brim.checkpoints.companions import companions, copy_companions
from brim.checkpoints.layouts import int_quantized, plain
from brim.checkpoints.linears import find_linears
from brim.checkpoints.reader import tiles
from brim.checkpoints.writer import SafetensorsWriter, Shard, Written, plan_shards, write_index
from brim.errors import DoesNotFitError, ModelFileError, UsageError
from brim.models import describe
from brim.models.directory import StoredTensor, checked_file, stored_tensors
from brim.models.files import read_json_object
from brim.models.spec import ModelSpec, TensorSpec
from brim.numerics.encode import TORCH_DTYPES, decode, encode_integer
from brim.publish import check_room, whole_directory
from brim.units import Progress, no_progress

Target = Literal["fp16", "bf16", "int8"]
CONFIG = "config.json"
_FLOATS = ("fp64", "fp32", "fp16", "bf16")
_SMALL_FILE_BYTES = 2**20
"""Allowed for config, index and report when disk space is checked, beside 1 KiB a tensor."""


class Tile(NamedTuple):
    """Some rows of a tensor, encoded."""

    parts: tuple[Tensor, ...]
    """One per output of the conversion."""
    decoded: Tensor | None = None
    """What a reader will see; None where it is the source, bit by bit."""
    clipped: int = 0
    scale: Tensor | None = None


class Conversion(NamedTuple):
    """What becomes of one tensor."""

    source: StoredTensor
    outputs: tuple[TensorSpec, ...]
    encode: Callable[[Tensor], Tile]
    row_elements: int = 1
    """Elements that must stay together in a tile."""


class _Job(NamedTuple):
    conversions: tuple[Conversion, ...]
    config: Mapping[str, Any]
    layout: str


def quantize(source: Path, output: Path, *, to: Target, progress: Progress = no_progress) -> QuantizationReport:
    """Write the model in directory `source` to the new directory `output`, its floats as FP16 or BF16, or its linear
    weights as INT8 (compressed-tensors `int-quantized`); tokenizer, generation settings and licences go along.

    `progress` counts bytes read from the source and back from the output. The output appears whole or not at all.
    Raises UsageError for a source that is quantized, that INT8 has nothing for, or an output that exists,
    ModelFileError for NaN, Inf and overflow, DoesNotFitError where the disk lacks the room.
    """
    check_output(output, source=source)
    spec = describe(str(source.resolve()))
    job = _job(source, spec, to)
    shards = plan_shards(conversion.outputs for conversion in job.conversions)
    files = companions(source)
    small_bytes = _SMALL_FILE_BYTES + 1024 * len(job.conversions) + sum(file.stat().st_size for file in files)
    check_room(output.absolute().parent, sum(shard.nbytes for shard in shards) + small_bytes, what=f"output {output}")
    total = sum(conversion.source.spec.nbytes for conversion in job.conversions)
    total += sum(output.nbytes for conversion in job.conversions for output in conversion.outputs)
    with _full_disk(output), whole_directory(output.absolute()) as directory:
        counter = _Counter(progress, total)
        with _one_thread():
            reports, written = _write_weights(directory, job.conversions, shards, counter)
        write_index(directory, shards)
        _verify(directory, written, counter)
        copy_companions(files, directory)
        report = QuantizationReport(model=source.resolve().name, to=to, layout=job.layout, tensors=reports)
        _write_json(directory / CONFIG, job.config)
        _write_json(directory / REPORT_NAME, report.to_dict())
    return report


class _Counter:
    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress(self.done, self.total)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A tile's operation takes about a millisecond: sharing it out to threads costs more than it saves, and on a busy
    machine far more (SmolLM2-135M on two busy cores: 48 s with two threads, 3 s with one)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _full_disk(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DoesNotFitError(
            f"output {output}: the disk ran full while it was written ({error.strerror}), so nothing was kept; "
            "free some, or choose a place on a larger disk"
        ) from error


def check_output(output: Path, *, source: Path | None) -> None:
    """Raises UsageError unless `output` can be made: nothing of that name exists, or an empty directory."""
    if source is not None and output.resolve() == source.resolve():
        raise UsageError(f"output {output} is the model itself; name another directory with --output")
    # A link, even to an empty directory, is not something that a finished directory can be renamed to.
    if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
        raise UsageError(f"output {output} exists already; name another with --output, or remove it")


def _job(source: Path, spec: ModelSpec, to: Target) -> _Job:
    config = read_json_object(checked_file(source, CONFIG))
    stored = stored_tensors(source)
    if not stored:
        raise UsageError(f"{source} has a config.json but no weights; copy its safetensors files beside it")
    _check_unquantized(source, config, stored)
    if to == "int8":
        linears = find_linears(spec, tensors=[tensor.spec.name for tensor in stored if _is_float_matrix(tensor.spec)])
        conversions = tuple(
            _to_int8(tensor) if tensor.spec.name in linears.weights else _keep(tensor) for tensor in stored
        )
        job = _Job(conversions, int_quantized.config(config, ignore=linears.left_alone), int_quantized.LAYOUT)
    else:
        job = _Job(tuple(_cast(tensor, to) for tensor in stored), plain.config(config, to=to), "plain")
    if all(conversion.outputs == (conversion.source.spec,) for conversion in job.conversions):
        raise UsageError(f"{source} has {_nothing(spec, to)}")
    return job


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


def _keep(tensor: StoredTensor) -> Conversion:
    return Conversion(tensor, (tensor.spec,), lambda tile: Tile((tile,)))


def _cast(tensor: StoredTensor, to: str) -> Conversion:
    if tensor.spec.dtype not in _FLOATS or tensor.spec.dtype == to:
        return _keep(tensor)

    def encode(tile: Tensor) -> Tile:
        cast = tile.to(TORCH_DTYPES[to])
        return Tile((cast,), decoded=cast)

    return Conversion(tensor, plain.outputs(tensor.spec, to=to), encode)


def _is_float_matrix(tensor: TensorSpec) -> bool:
    return tensor.dtype in _FLOATS and len(tensor.shape) == 2 and tensor.numel > 0


def _to_int8(tensor: StoredTensor) -> Conversion:
    codes, scale = int_quantized.outputs(tensor.spec)
    inputs = tensor.spec.shape[1]
    encode = partial(_encode_rows, inputs=inputs, scale_dtype=TORCH_DTYPES[scale.dtype])
    return Conversion(tensor, (codes, scale), encode, row_elements=inputs)


def _encode_rows(tile: Tensor, *, inputs: int, scale_dtype: torch.dtype) -> Tile:
    encoded = encode_integer(tile.view(-1, inputs), granularity=int_quantized.GRANULARITY, scale_dtype=scale_dtype)
    decoded = decode(encoded.codes, encoded.scale, granularity=int_quantized.GRANULARITY)
    return Tile((encoded.codes, encoded.scale), decoded.flatten(), encoded.num_clipped, encoded.scale)


def _write_weights(
    directory: Path, conversions: Sequence[Conversion], shards: Sequence[Shard], counter: _Counter
) -> tuple[tuple[TensorReport, ...], dict[str, Written]]:
    """Reports of all tensors, and what was written of each output."""
    reports: list[TensorReport] = []
    written: dict[str, Written] = {}
    waiting = list(reversed(conversions))
    for shard in shards:
        names = {tensor.name for tensor in shard.tensors}
        with SafetensorsWriter(directory / shard.file_name, shard.tensors) as writer:
            while waiting and waiting[-1].outputs[0].name in names:
                reports.append(_convert(waiting.pop(), writer, counter))
        written |= writer.written
    return tuple(reports), written


def _convert(conversion: Conversion, writer: SafetensorsWriter, counter: _Counter) -> TensorReport:
    source, audit = conversion.source, TensorAudit()
    first, overflowed, largest = 0, 0, 0.0
    for tile in tiles(source, row_elements=conversion.row_elements):
        _check_finite(tile, source, first)
        encoded = conversion.encode(tile)
        for output, part in zip(conversion.outputs, encoded.parts, strict=True):
            writer.append(output.name, part)
        if encoded.decoded is not None:
            if past := int(torch.isinf(tile.to(encoded.decoded.dtype)).sum()):
                overflowed, largest = overflowed + past, max(largest, float(tile.abs().max()))
            audit.add(tile, encoded.decoded, clipped=encoded.clipped, scale=encoded.scale)
        first += tile.numel()
        counter.add(tile.nbytes)
    if overflowed:
        raise _overflow(source, conversion.outputs[0].dtype, overflowed, largest)
    return audit.report(source.spec, conversion.outputs)


def _check_finite(tile: Tensor, source: StoredTensor, first: int) -> None:
    """Raises ModelFileError with the place of the first NaN or Inf; the tile begins at element `first`."""
    if not tile.is_floating_point():
        return
    if tile.itemsize == 1:
        tile = tile.float()  # torch neither adds FP8 nor asks it for Inf
    # One pass: the sum of a tensor is finite only if its elements are (it may overflow all the same, so look again).
    if bool(torch.isfinite(tile.sum())):
        return
    wrong = (~torch.isfinite(tile)).nonzero()
    if len(wrong):
        place = int(wrong[0])
        index = [int(axis) for axis in torch.unravel_index(torch.tensor(first + place), source.spec.shape)]
        raise ModelFileError(
            f"{source.path}: tensor {source.spec.name!r} holds {float(tile[place])} at index {index}; "
            "a model with such weights cannot be right, so it is not converted"
        )


def _overflow(source: StoredTensor, to: str, count: int, largest: float) -> ModelFileError:
    advice = "use --to bf16, whose range is that of FP32" if to == "fp16" else "leave the model in its format"
    return ModelFileError(
        f"{source.path}: tensor {source.spec.name!r}: {count} values are past the largest of {to.upper()} "
        f"(the largest is {largest:g}) and would become Inf; {advice}"
    )


def _verify(directory: Path, written: Mapping[str, Written], counter: _Counter) -> None:
    """Raises ModelFileError unless the files, read anew, hold what was encoded."""
    found = stored_tensors(directory)
    assert {stored.spec.name for stored in found} == written.keys()
    for stored in found:
        crc32 = 0
        for tile in tiles(stored):
            crc32 = zlib.crc32(tile.view(torch.uint8).numpy().data, crc32)
            counter.add(tile.nbytes)
        if crc32 != written[stored.spec.name].crc32:
            raise ModelFileError(f"tensor {stored.spec.name!r} came back from the disk other than it was written; "
                                 "nothing was kept; check the disk")  # fmt: skip


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
