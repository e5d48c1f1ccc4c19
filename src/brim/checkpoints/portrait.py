"""`portrait`: the elements of one weight before and after a conversion, as many as a picture needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from brim.checkpoints.conversion import Conversion
from brim.checkpoints.job import plan_job
from brim.checkpoints.mixture import NO_MIXTURE, Mixture
from brim.checkpoints.reader import element_type, opened, read_columns, read_into
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.sources import read_model
from brim.checkpoints.stream import Reading, count_workers, readings_of
from brim.checkpoints.survey import surveyed
from brim.checkpoints.targets import ScaleChoice, Wanted
from brim.checkpoints.writer import bytes_of
from brim.errors import UsageError, did_you_mean
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import Granularity, PerGroup

SAMPLE = 2**20
"""Elements that are kept of a larger tensor."""


class Portrait(NamedTuple):
    """Elements of one tensor, each before and after; of the whole and of those that share the largest one's scale."""

    name: str
    format: str
    before: Tensor
    after: Tensor
    """FP32, every so many-th element."""
    block_before: Tensor
    block_after: Tensor
    """Those that share a scale with the largest element; of a scale for the whole tensor, those of its row."""


def portrait(
    source: Path,
    tensor: str,
    *,
    wanted: Wanted,
    granularity: Granularity | None,
    scales: ScaleChoice,
    symmetric: bool,
    memory_bytes: int,
    mixture: Mixture = NO_MIXTURE,
    unpickle: bool = False,
) -> Portrait:
    """Of the tensor of this name in the model's files, read once. Raises UsageError where it is not converted."""
    spec, stored = read_model(source, unpickle)
    job = plan_job(
        source, spec, stored, wanted.to, layout=wanted.layout, granularity=granularity, scales=scales,
        symmetric=symmetric, mixture=mixture,
    )  # fmt: skip
    conversion = _found(job.conversions, tensor)
    job = surveyed({".": job._replace(conversions=(conversion,))}, memory_bytes=memory_bytes)["."]
    (reading,) = readings_of([job.conversions])
    count_workers([reading], memory_bytes=memory_bytes)
    return _drawn(reading, _block_size(job.conversions[0], granularity))


def _found(conversions: Sequence[Conversion], name: str) -> Conversion:
    names = {each.source.spec.name: each for each in conversions if each.outputs != (each.source.spec,)}
    if name not in names:
        example = did_you_mean(name, names) or (f"; one is {next(iter(names))!r}" if names else "")
        raise UsageError(f"--tensor {name!r} is none of the {len(names)} tensors that are converted{example}")
    return names[name]


def _block_size(conversion: Conversion, granularity: Granularity | None) -> int:
    """Elements of a row that share a scale."""
    if conversion.integers is not None:
        granularity = conversion.integers.granularity
    row = FORMATS.get(conversion.format or conversion.outputs[0].dtype)
    size = granularity.size if isinstance(granularity, PerGroup) else row.block if row else 0
    return size or conversion.source.spec.shape[-1]


def _shared(values: Tensor, place: int, block_size: int) -> Tensor:
    begin = place // block_size * block_size
    return values[begin : begin + block_size].clone()


def _drawn(reading: Reading, block_size: int) -> Portrait:
    conversion, source, scratch = reading.conversions[0], reading.source, Scratch()
    numel = source.spec.numel
    stride = -(-numel // SAMPLE)
    dtype, size = element_type(source.spec), reading.block_elements
    before, after, top = list[Tensor](), list[Tensor](), -1.0
    block_before = block_after = torch.empty(0)
    with opened(source) as descriptor:
        for first in range(0, numel, size):
            block = torch.empty(min(size, numel - first), dtype=dtype)
            if reading.reads_columns:
                block = read_columns(descriptor, first // reading.column_elements, block, source)
            else:
                read_into(descriptor, bytes_of(block), first * dtype.itemsize, source)
            width = conversion.row_elements
            rows = block.view(-1, width) if width > 1 else block
            found = conversion.encoded(rows, first // width, scratch).decoded().float().flatten()
            values = block.float()
            largest = int(values.abs().argmax())
            if float(values[largest].abs()) > top:
                top = float(values[largest].abs())
                # GGUF puts rows of queries and keys in another order; elsewhere the two places are one.
                same = float(found[largest].abs()) == float(found.abs().max())
                place = largest if same else int(found.abs().argmax())
                block_before = _shared(values, largest, block_size)
                block_after = _shared(found, place, block_size)
            # Samples go on with the count where the last block ended.
            begin = -first % stride
            before.append(values[begin::stride].clone())
            after.append(found[begin::stride].clone())
    format = conversion.format or conversion.outputs[0].dtype
    return Portrait(source.spec.name, format, torch.cat(before), torch.cat(after), block_before, block_after)
