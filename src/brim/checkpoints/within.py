"""`within_budget`: INT8, INT4 or nothing for each linear weight, so that the model takes no more than a size."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from brim.checkpoints.budget import Choice, cheapest
from brim.checkpoints.job import Job, plan_job
from brim.checkpoints.journal import Done
from brim.checkpoints.mixture import KEPT, MIXED, Mixture
from brim.checkpoints.stream import Chunk, chunks_of, count_workers, look_through, readings_of
from brim.checkpoints.targets import ScaleChoice, Target
from brim.errors import UsageError
from brim.models.directory import StoredTensor
from brim.models.spec import ModelSpec
from brim.numerics.granularity import Granularity, PerTensor
from brim.units import Progress, no_progress

_FORMATS: tuple[Target, ...] = ("int8", "int4")


def within_budget(
    source: Path,
    spec: ModelSpec,
    stored: Sequence[StoredTensor],
    *,
    budget_bytes: int,
    mixture: Mixture,
    granularity: Granularity | None,
    scales: ScaleChoice,
    memory_bytes: int,
    progress: Progress = no_progress,
) -> Mixture:
    """The mixture with a format for each weight that it does not keep: of all that hold the model's tensors within
    `budget_bytes`, the one with the least squared error of the weights in all.

    Each weight is encoded in each format to know its error; `progress` counts the bytes that are read for it.
    Raises DoesNotFitError where no choice is small enough, UsageError beside formats by pattern.
    """
    if mixture.formats:
        raise UsageError("--budget chooses the formats itself; leave --format away (--keep may stay)")
    if isinstance(granularity, PerTensor):
        raise UsageError("--budget weighs scales by channel or group; leave --granularity tensor away")
    jobs = {
        to: plan_job(source, spec, stored, to, granularity=granularity, scales=scales, mixture=mixture)
        for to in _FORMATS
    }
    fixed_bytes = sum(c.source.spec.nbytes for c in jobs["int8"].conversions if c.integers is None)
    sizes = {c.source.spec.name: c.source.spec.nbytes for c in jobs["int8"].conversions if c.integers is not None}
    told = _Told(progress, total=len(jobs) * sum(sizes.values()))
    errors = {to: _errors(job, memory_bytes=memory_bytes, told=told) for to, job in jobs.items()}
    options = [
        {KEPT: Choice(nbytes, 0.0)} | {to: Choice(_nbytes(jobs[to])[name], errors[to][name]) for to in _FORMATS}
        for name, nbytes in sizes.items()
    ]
    picked = cheapest([tuple(ways.values()) for ways in options], budget_bytes=budget_bytes - fixed_bytes)
    chosen = {name: (KEPT, *_FORMATS)[number] for name, number in zip(sizes, picked, strict=True)}
    return replace(mixture, chosen=chosen)


def _nbytes(job: Job) -> Mapping[str, int]:
    """Of what each weight becomes; a shape's sixteen bytes and more that INT8 by itself would not have count, too."""
    return {
        c.source.spec.name: sum(tensor.nbytes for tensor in c.tensors) + _SHAPE_BYTES * (len(c.tensors) == 2)
        for c in job.conversions
    }


def _errors(job: Job, *, memory_bytes: int, told: "_Told") -> Mapping[str, float]:
    """Squared error of each weight."""
    open_ones = [conversion for conversion in job.conversions if conversion.integers is not None]
    noise = {conversion.source.spec.name: 0.0 for conversion in open_ones}

    def collect(chunk: Chunk, done: tuple[Done, ...]) -> None:
        noise[chunk.reading.source.spec.name] += done[0].statistics.noise
        told.add(chunk.source_bytes)

    readings = readings_of([open_ones])
    workers = count_workers(readings, memory_bytes=memory_bytes)
    look_through(chunks_of(readings), workers=workers, collect=collect)
    return noise


class _Told:
    """Bytes read so far."""

    def __init__(self, progress: Progress, *, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(self._done, self._total)


_SHAPE_BYTES = 16
"""pack-quantized, which holds mixtures, has the shape beside each weight; int-quantized has not."""
assert set(_FORMATS) == set(MIXED)
