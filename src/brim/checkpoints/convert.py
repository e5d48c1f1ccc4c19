"""`quantize`: a model directory into smaller ones, block by block, so that memory does not grow with the model.

Every output's name, shape, dtype and place follows from the source's headers, so disk space is checked and file headers
are written before the first weight is read. What was written is read back and compared before the directory appears.
"""

import errno
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from brim.checkpoints.audit import REPORT_NAME, QuantizationReport, tensor_report
from brim.checkpoints.calibrate import calibrate, decisions_of
from brim.checkpoints.companions import companions, copy_companions
from brim.checkpoints.job import Job, as_json, plan_job
from brim.checkpoints.journal import NAME as JOURNAL
from brim.checkpoints.journal import Done, Journal
from brim.checkpoints.layouts import gguf
from brim.checkpoints.mixture import NO_MIXTURE, Mixture
from brim.checkpoints.sources import read_model
from brim.checkpoints.statistics import Statistics
from brim.checkpoints.stream import (
    Chunk,
    Reading,
    chunks_of,
    convert,
    count_workers,
    look_through,
    readings_of,
    verify,
)
from brim.checkpoints.survey import surveyed
from brim.checkpoints.targets import CalibrationText, Family, ScaleChoice, Target, Wanted
from brim.checkpoints.workplace import (
    Jobs,
    check_workplace,
    create_files,
    identity,
    places_read,
    removed_unless_resumable,
)
from brim.errors import DoesNotFitError, ModelFileError, UsageError
from brim.models.directory import StoredTensor
from brim.models.spec import ModelSpec
from brim.numerics.granularity import Granularity
from brim.publish import alone, appear, partial_of
from brim.units import MIB, Progress, no_progress

MEMORY_BYTES = 512 * MIB


def quantize(
    source: Path,
    output: Path,
    *,
    to: Target,
    granularity: Granularity | None = None,
    layout: Family | None = None,
    scales: ScaleChoice = "absmax",
    symmetric: bool = True,
    calibration: CalibrationText | None = None,
    mixture: Mixture = NO_MIXTURE,
    unpickle: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    resume: bool = False,
    progress: Progress = no_progress,
    calibration_progress: Progress = no_progress,
) -> QuantizationReport:
    """Write the model in directory `source` to the new directory `output`, its floats as FP16 or BF16, or its linear
    weights as INT8, INT4, FP8 or MXFP4 (compressed-tensors), INT8 or FP8 (torchao), INT8 or NF4 (bitsandbytes), or all
    of it in one GGUF file; tokenizer, generation settings and licences go along. `layout` None: the format's default.
    `granularity` is that of scales; None: INT8 and FP8 by channel, INT4 by groups of 32. `scales` says how those of
    integers are chosen, `symmetric` whether code 0 is their zero; `calibration` is the text that "calibrated" needs,
    and what that decides is kept beside the output until it is done. `mixture` says which linear weights get another of
    these integers, or stay. `unpickle` reads the weights from PyTorch's .bin files.

    Takes at most `memory_bytes` beside what the interpreter has. `progress` counts bytes read from the source and back
    from the output. The output appears whole or not at all. With `resume`, what a killed run did is not done again,
    and the result is the same byte by byte.
    Raises UsageError for a source that is quantized, that integers have nothing for, a granularity that does not suit,
    an output that exists or that another run makes, or a killed run of other work; ModelFileError for NaN, Inf and
    overflow; DoesNotFitError where the disk or `memory_bytes` lacks the room; Stopped for an interrupted run that can
    be resumed.
    """
    (report,) = _quantize(
        source, output, {".": Wanted(to, layout)}, _Asked(granularity, scales, symmetric, mixture),
        calibration=calibration, unpickle=unpickle, memory_bytes=memory_bytes, resume=resume, progress=progress,
        calibration_progress=calibration_progress,
    )  # fmt: skip
    return report


def quantize_all(
    source: Path,
    output: Path,
    wanted: Sequence[Wanted],
    *,
    granularity: Granularity | None = None,
    scales: ScaleChoice = "absmax",
    symmetric: bool = True,
    mixture: Mixture = NO_MIXTURE,
    unpickle: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    resume: bool = False,
    progress: Progress = no_progress,
) -> tuple[QuantizationReport, ...]:
    """As `quantize`, several outputs from one pass over the source's weights: a report for each, in order.

    Each has a directory of its own in the new directory `output`, named FORMAT-LAYOUT. All of them appear, or none.
    """
    return _quantize(
        source, output, {each.name: each for each in wanted}, _Asked(granularity, scales, symmetric, mixture),
        calibration=None, unpickle=unpickle, memory_bytes=memory_bytes, resume=resume, progress=progress,
        calibration_progress=no_progress,
    )  # fmt: skip


class _Asked(NamedTuple):
    """Of integers."""

    granularity: Granularity | None
    scales: ScaleChoice
    symmetric: bool
    mixture: Mixture


def _quantize(
    source: Path,
    output: Path,
    wanted: Mapping[str, Wanted],
    asked: _Asked,
    *,
    calibration: CalibrationText | None,
    unpickle: bool,
    memory_bytes: int,
    resume: bool,
    progress: Progress,
    calibration_progress: Progress,
) -> tuple[QuantizationReport, ...]:
    """`wanted`: by the directory in the output."""
    check_output(output, source=source)
    spec, stored = read_model(source, unpickle)
    _check_calibration(asked.scales, calibration, unpickle)
    jobs = _plan(source, spec, stored, wanted, asked)
    place, partial = output.absolute(), partial_of(output.absolute())
    with _full_disk(output), alone(place), _decisions_removed(place):
        if calibration is not None:
            ((name, job),) = jobs.items()
            decided = calibrate(
                source, spec, job, decisions_of(place), text=calibration, memory_bytes=memory_bytes, resume=resume,
                progress=calibration_progress,
            )  # fmt: skip
            jobs = {name: decided.applied_to(job)}
        jobs = surveyed(jobs, memory_bytes=memory_bytes)
        readings = readings_of([job.conversions for job in jobs.values()])
        workers = count_workers(readings, memory_bytes=memory_bytes)
        go_on = check_workplace(partial, jobs, output=output, resume=resume)
        with removed_unless_resumable(partial):
            collected = _write(partial, jobs, readings, go_on=go_on, workers=workers, progress=progress)
            reports = _reports(source, jobs, collected)
            for name, report in zip(jobs, reports, strict=True):
                copy_companions(companions(source, all_in_one=report.layout == gguf.LAYOUT), partial / name)
                (partial / name / REPORT_NAME).write_text(as_json(report.to_dict()), encoding="utf-8")
            (partial / JOURNAL).unlink()
            appear(partial, place)
    return reports


def _plan(
    source: Path, spec: ModelSpec, stored: Sequence[StoredTensor], wanted: Mapping[str, Wanted], asked: _Asked
) -> dict[str, Job]:
    return {
        name: plan_job(source, spec, stored, each.to, layout=each.layout, **asked._asdict())
        for name, each in wanted.items()
    }


def _check_calibration(scales: ScaleChoice, calibration: CalibrationText | None, unpickle: bool) -> None:
    if calibration is not None and unpickle:
        raise UsageError("calibration runs the model, and .bin files are converted without; use --to fp32 first")
    if (scales == "calibrated") != (calibration is not None):
        raise UsageError("calibrated scales need a text to calibrate on, and others have no use for one: "
                         "--scales calibrated --calibration FILE")  # fmt: skip


@contextmanager
def _decisions_removed(place: Path) -> Iterator[None]:
    """At the end, unless a run that can be gone on with is left."""
    try:
        yield
    finally:
        if not partial_of(place).exists():
            shutil.rmtree(decisions_of(place), ignore_errors=True)


def audit(
    source: Path,
    *,
    to: Target,
    granularity: Granularity | None = None,
    layout: Family | None = None,
    scales: ScaleChoice = "absmax",
    symmetric: bool = True,
    mixture: Mixture = NO_MIXTURE,
    unpickle: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress = no_progress,
) -> QuantizationReport:
    """The report that `quantize` would give, without writing anything.

    `progress` counts bytes read from the source. Raises what `quantize` does on account of the source.
    """
    (report,) = audit_all(
        source, [Wanted(to, layout)], granularity=granularity, scales=scales, symmetric=symmetric, mixture=mixture,
        unpickle=unpickle, memory_bytes=memory_bytes, progress=progress,
    )  # fmt: skip
    return report


def audit_all(
    source: Path,
    wanted: Sequence[Wanted],
    *,
    granularity: Granularity | None = None,
    scales: ScaleChoice = "absmax",
    symmetric: bool = True,
    mixture: Mixture = NO_MIXTURE,
    unpickle: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress = no_progress,
) -> tuple[QuantizationReport, ...]:
    """The reports that `quantize_all` would give, without writing anything."""
    if scales == "calibrated":
        raise UsageError("--audit looks at weights alone; leave --scales calibrated away, or use --scales mse")
    spec, stored = read_model(source, unpickle)
    jobs = _plan(
        source, spec, stored, {each.name: each for each in wanted}, _Asked(granularity, scales, symmetric, mixture)
    )
    jobs = surveyed(jobs, memory_bytes=memory_bytes)
    readings = readings_of([job.conversions for job in jobs.values()])
    collected = _Collected(jobs, readings, progress, read_back=False)
    workers = count_workers(readings, memory_bytes=memory_bytes)
    look_through(chunks_of(readings), workers=workers, collect=collected.add)
    return _reports(source, jobs, collected)


def _reports(source: Path, jobs: Jobs, collected: "_Collected") -> tuple[QuantizationReport, ...]:
    return tuple(
        QuantizationReport(
            model=source.resolve().name,
            to=job.to,
            layout=job.layout,
            tensors=tuple(
                tensor_report(c.source.spec, c.tensors, collected.sums[number, c.source.spec.name], format=c.format)
                for c in job.conversions
            ),
        )
        for number, job in enumerate(jobs.values())
    )


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


def _write(
    directory: Path,
    jobs: Jobs,
    readings: Sequence[Reading],
    *,
    go_on: bool,
    workers: int,
    progress: Progress,
) -> "_Collected":
    """The weights; read back and compared."""
    if not go_on:
        create_files(directory, jobs)
    collected = _Collected(jobs, readings, progress)
    places = [
        {
            spec.name: (directory / place / file.name, file.places[spec.name])
            for file in job.files
            for spec in file.tensors
        }
        for place, job in jobs.items()
    ]
    with Journal(directory, identity(jobs)) as journal:
        convert(chunks_of(readings), places, workers=workers, journal=journal, collect=collected.add)
    read = [places_read(directory / place, job) for place, job in jobs.items()]
    verify(collected.done, read, workers=workers, count=collected.count)
    return collected


class _Collected:
    """What has been done, and how much of all there is to do."""

    def __init__(self, jobs: Jobs, readings: Iterable[Reading], progress: Progress, *, read_back: bool = True) -> None:
        self.done: list[tuple[Chunk, tuple[Done, ...]]] = []
        self.sums = {
            (number, conversion.source.spec.name): Statistics()
            for number, job in enumerate(jobs.values())
            for conversion in job.conversions
        }
        self._progress, self._bytes = progress, 0
        self._total = sum(reading.source.spec.nbytes for reading in readings)
        if read_back:
            self._total += sum(spec.nbytes for job in jobs.values() for c in job.conversions for spec in c.outputs)

    def add(self, chunk: Chunk, done: tuple[Done, ...]) -> None:
        """The next chunk. Raises ModelFileError at the end of a tensor that overflowed."""
        source = chunk.reading.source
        for conversion, number, each in zip(*chunk.reading, done, strict=True):
            sums = self.sums[number, conversion.source.spec.name]
            sums.add(each.statistics)
            if sums.overflowed and sums.elements == source.spec.numel:
                raise _overflow(source, conversion.format or conversion.outputs[0].dtype, sums)
        self.done.append((chunk, done))
        self.count(chunk.source_bytes)

    def count(self, nbytes: int) -> None:
        self._bytes += nbytes
        self._progress(self._bytes, self._total)


def _overflow(source: StoredTensor, to: str, sums: Statistics) -> ModelFileError:
    advice = "use --to bf16, whose range is that of FP32" if to == "fp16" else "leave the model in its format"
    return ModelFileError(
        f"{source.path}: tensor {source.spec.name!r}: {sums.overflowed} values are past the largest of {to.upper()} "
        f"(the largest is {sums.largest:g}) and would become Inf; {advice}"
    )
