"""What must be known of a whole tensor before its first block is encoded: the least and the greatest element.

The weights that share one scale in all are read once more for it, and only for it: two passes over a block.
"""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing

import torch

from brim.checkpoints.conversion import Conversion
from brim.checkpoints.crew import share_out
from brim.checkpoints.job import Job
from brim.checkpoints.reader import element_type, opened, read_into
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.stream import Chunk, chunks_of, count_workers, readings_of
from brim.checkpoints.writer import bytes_of


def surveyed(jobs: Mapping[str, Job], *, memory_bytes: int) -> dict[str, Job]:
    """The jobs, with what was still open of their conversions."""
    readings = readings_of([[c for c in job.conversions if c.by_bounds is not None] for job in jobs.values()])
    if not readings:
        return dict(jobs)
    workers = count_workers(readings, memory_bytes=memory_bytes)
    found: defaultdict[object, list[tuple[float, float]]] = defaultdict(list)
    chunks = chunks_of(readings)
    with closing(share_out(chunks, _bounds, workers=workers)) as results:
        for chunk, bounds in zip(chunks, results, strict=True):
            found[_place(chunk.reading.conversions[0])].append(bounds)

    def told(conversion: Conversion) -> Conversion:
        if conversion.by_bounds is None:
            return conversion
        least, greatest = zip(*found[_place(conversion)], strict=True)
        return conversion.by_bounds(min(least), max(greatest))

    return {name: job._replace(conversions=tuple(told(c) for c in job.conversions)) for name, job in jobs.items()}


def _place(conversion: Conversion) -> object:
    return conversion.source.path, conversion.source.offset


def _bounds(chunk: Chunk, scratch: Scratch) -> tuple[float, float]:
    """Of elements that are numbers; others are refused when they are converted."""
    source = chunk.reading.source
    dtype, size = element_type(source.spec), chunk.reading.block_elements
    bounds = list[tuple[float, float]]()
    with opened(source) as descriptor:
        for first in range(chunk.first, chunk.first + chunk.elements, size):
            block = scratch.take("block", (min(size, chunk.first + chunk.elements - first),), dtype)
            # A matrix that the file has transposed has the same elements.
            read_into(descriptor, bytes_of(block), first * dtype.itemsize, source)
            least, greatest = torch.aminmax(block)
            bounds.append((float(least), float(greatest)))
    least_of, greatest_of = zip(*bounds, strict=True)
    return min(least_of), max(greatest_of)
