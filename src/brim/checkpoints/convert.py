"""`quantize`: a model directory into a smaller one, block by block, so that memory does not grow with the model.

Every output's name, shape, dtype and place follows from the source's headers, so disk space is checked and file headers
are written before the first weight is read. What was written is read back and compared before the directory appears.
"""

import errno
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from brim import __version__
from brim.checkpoints.audit import REPORT_NAME, QuantizationReport, tensor_report
from brim.checkpoints.calibrate import calibrate, decisions_of
from brim.checkpoints.companions import companions, copy_companions
from brim.checkpoints.conversion import BLOCK_ELEMENTS
from brim.checkpoints.job import Job, as_json, plan_job
from brim.checkpoints.journal import NAME as JOURNAL
from brim.checkpoints.journal import Done, Journal, has_chunks, identity_in
from brim.checkpoints.keras_weights import keras_tensors
from brim.checkpoints.layouts import gguf
from brim.checkpoints.mixture import NO_MIXTURE, Mixture
from brim.checkpoints.pickled import pickled_tensors
from brim.checkpoints.statistics import Statistics
from brim.checkpoints.stream import CHUNK_BLOCKS, Chunk, Places, chunks_of, convert, count_workers, look_through, verify
from brim.checkpoints.targets import CalibrationText, Family, ScaleChoice, Target
from brim.checkpoints.writer import create
from brim.errors import DoesNotFitError, ModelFileError, Stopped, UsageError
from brim.models.describe import describe_directory
from brim.models.directory import StoredTensor, keras_file, stored_tensors
from brim.models.gguf_header import read_gguf_header
from brim.models.spec import ModelSpec
from brim.numerics.granularity import Granularity
from brim.publish import alone, appear, check_room, partial_of, sync_tree
from brim.units import MIB, Progress, no_progress

MEMORY_BYTES = 512 * MIB
_SMALL_FILE_BYTES = 2**20
"""Allowed for config, index and report when disk space is checked, beside 1 KiB a tensor."""


def quantize(
    source: Path,
    output: Path,
    *,
    to: Target,
    granularity: Granularity | None = None,
    layout: Family | None = None,
    scales: ScaleChoice = "absmax",
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
    `granularity` is that of integers; None: INT8 by channel, INT4 by groups of 32. `scales` says how theirs are chosen;
    `calibration` is the text that "calibrated" needs, and what that decides is kept beside the output until it is done.
    `mixture` says which linear weights get another of these integers, or stay. `unpickle` reads the weights from
    PyTorch's .bin files.

    Takes at most `memory_bytes` beside what the interpreter has. `progress` counts bytes read from the source and back
    from the output. The output appears whole or not at all. With `resume`, what a killed run did is not done again,
    and the result is the same byte by byte.
    Raises UsageError for a source that is quantized, that integers have nothing for, a granularity that does not suit,
    an output that exists or that another run makes, or a killed run of other work; ModelFileError for NaN, Inf and
    overflow; DoesNotFitError where the disk or `memory_bytes` lacks the room; Stopped for an interrupted run that can
    be resumed.
    """
    check_output(output, source=source)
    spec, stored = _read(source, unpickle)
    _check_calibration(scales, calibration, unpickle)
    job = plan_job(source, spec, stored, to, granularity=granularity, layout=layout, scales=scales, mixture=mixture)
    place, partial = output.absolute(), partial_of(output.absolute())
    with _full_disk(output), alone(place), _decisions_removed(place):
        if calibration is not None:
            decided = calibrate(
                source, spec, job, decisions_of(place), text=calibration, memory_bytes=memory_bytes, resume=resume,
                progress=calibration_progress,
            )  # fmt: skip
            job = decided.applied_to(job)
        workers = count_workers(job.conversions, memory_bytes=memory_bytes)
        go_on = _check_workplace(partial, job, output=output, resume=resume)
        with _removed_unless_resumable(partial):
            collected = _write(partial, job, go_on=go_on, workers=workers, progress=progress)
            report = _report(source, job, collected, to)
            copy_companions(companions(source, all_in_one=report.layout == gguf.LAYOUT), partial)
            (partial / REPORT_NAME).write_text(as_json(report.to_dict()), encoding="utf-8")
            (partial / JOURNAL).unlink()
            appear(partial, place)
    return report


def _read(source: Path, unpickle: bool) -> tuple[ModelSpec, tuple[StoredTensor, ...]]:
    """What the model is, and where its tensors are."""
    if unpickle:
        stored = pickled_tensors(source)
    else:
        stored = keras_tensors(source) if keras_file(source) else stored_tensors(source)
    return describe_directory(str(source.resolve()), source.resolve(), stored), stored


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
    mixture: Mixture = NO_MIXTURE,
    unpickle: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress = no_progress,
) -> QuantizationReport:
    """The report that `quantize` would give, without writing anything.

    `progress` counts bytes read from the source. Raises what `quantize` does on account of the source.
    """
    if scales == "calibrated":
        raise UsageError("--audit looks at weights alone; leave --scales calibrated away, or use --scales mse")
    spec, stored = _read(source, unpickle)
    job = plan_job(source, spec, stored, to, granularity=granularity, layout=layout, scales=scales, mixture=mixture)
    workers = count_workers(job.conversions, memory_bytes=memory_bytes)
    chunks = tuple(chunk for conversion in job.conversions for chunk in chunks_of(conversion))
    collected = _Collected(job, progress, read_back=False)
    look_through(chunks, workers=workers, collect=collected.add)
    return _report(source, job, collected, to)


def _report(source: Path, job: Job, collected: "_Collected", to: Target) -> QuantizationReport:
    tensors = tuple(
        tensor_report(c.source.spec, c.tensors, collected.sums[c.source.spec.name], format=c.format)
        for c in job.conversions
    )
    return QuantizationReport(model=source.resolve().name, to=to, layout=job.layout, tensors=tensors)


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


def _identity(job: Job) -> dict[str, Any]:
    """What must be the same for a killed run to be gone on with: the source's files, and all that is made of them."""
    sources = sorted({conversion.source.path for conversion in job.conversions})
    made = hashlib.sha256()
    for file in job.files:
        made.update(file.name.encode() + file.header)
    for name, text in job.texts.items():
        made.update((name + text).encode())
    status = [(path, path.stat()) for path in sources]
    return {
        "brim": __version__,
        "settings": job.settings,
        "cut": [BLOCK_ELEMENTS, CHUNK_BLOCKS],
        "source": [[path.name, facts.st_size, facts.st_mtime_ns] for path, facts in status],
        "output": made.hexdigest(),
    }


def _check_workplace(partial: Path, job: Job, *, output: Path, resume: bool) -> bool:
    """Whether `partial` has what a killed run did, to go on from.

    Raises UsageError where it is other work that is to be gone on with, DoesNotFitError where the disk lacks the room.
    """
    found = identity_in(partial) if resume else None
    if found is not None and found != _identity(job):
        raise UsageError(
            f"{partial} is a killed run of another model, format or version of Brim; run without --resume to start over"
        )
    if found is None:
        shutil.rmtree(partial, ignore_errors=True)
    small_bytes = _SMALL_FILE_BYTES + 1024 * len(job.conversions) + sum(len(text) for text in job.texts.values())
    there_bytes = sum(512 * path.stat().st_blocks for path in partial.glob("*"))
    need_bytes = sum(file.nbytes for file in job.files) + small_bytes - there_bytes
    check_room(partial.parent, need_bytes, what=f"output {output}")
    return found is not None


def _create(directory: Path, job: Job) -> None:
    """All files, of full length; only what is converted is not in them."""
    directory.mkdir(parents=True)
    constants = dict(constant for conversion in job.conversions for constant in conversion.constants)
    for file in job.files:
        create(directory / file.name, file, {spec.name: constants[spec] for spec in file.tensors if spec in constants})
    for name, text in job.texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    sync_tree(directory)


@contextmanager
def _removed_unless_resumable(partial: Path) -> Iterator[None]:
    """Of an interrupted run that was long enough to have lines in its journal the work is kept; else nothing is."""
    kept = False
    try:
        yield
    except KeyboardInterrupt:
        kept = has_chunks(partial)
        if not kept:
            raise
        raise Stopped(
            f"interrupted; what was done is kept in {partial}: the same command with --resume goes on from there"
        ) from None
    finally:
        if not kept:
            shutil.rmtree(partial, ignore_errors=True)


def _write(directory: Path, job: Job, *, go_on: bool, workers: int, progress: Progress) -> "_Collected":
    """The weights; read back and compared."""
    if not go_on:
        _create(directory, job)
    collected = _Collected(job, progress)
    chunks = tuple(chunk for conversion in job.conversions for chunk in chunks_of(conversion))
    places = {spec.name: (directory / file.name, file.places[spec.name]) for file in job.files for spec in file.tensors}
    with Journal(directory, _identity(job)) as journal:
        convert(chunks, places, workers=workers, journal=journal, collect=collected.add)
    verify(collected.done, _places_read(directory, job), workers=workers, count=collected.count)
    return collected


class _Collected:
    """What has been done, and how much of all there is to do."""

    def __init__(self, job: Job, progress: Progress, *, read_back: bool = True) -> None:
        self.done: list[tuple[Chunk, Done]] = []
        self.sums = {conversion.source.spec.name: Statistics() for conversion in job.conversions}
        self._progress, self._bytes = progress, 0
        self._total = sum(
            spec.nbytes
            for conversion in job.conversions
            for spec in (conversion.source.spec, *(conversion.outputs if read_back else ()))
        )

    def add(self, chunk: Chunk, done: Done) -> None:
        """The next chunk. Raises ModelFileError at the end of a tensor that overflowed."""
        source, sums = chunk.conversion.source, self.sums[chunk.conversion.source.spec.name]
        sums.add(done.statistics)
        if sums.overflowed and sums.elements == source.spec.numel:
            raise _overflow(source, chunk.conversion.format or chunk.conversion.outputs[0].dtype, sums)
        self.done.append((chunk, done))
        self.count(chunk.source_bytes)

    def count(self, nbytes: int) -> None:
        self._bytes += nbytes
        self._progress(self._bytes, self._total)


def _places_read(directory: Path, job: Job) -> Places:
    """Where the headers of the files, read anew, say that the tensors are."""
    if job.layout == gguf.LAYOUT:
        path = directory / gguf.NAME
        header = read_gguf_header(path)
        return {entry.spec.name: (path, header.data_start + entry.begin) for entry in header.tensors}
    return {stored.spec.name: (stored.path, stored.offset) for stored in stored_tensors(directory)}


def _overflow(source: StoredTensor, to: str, sums: Statistics) -> ModelFileError:
    advice = "use --to bf16, whose range is that of FP32" if to == "fp16" else "leave the model in its format"
    return ModelFileError(
        f"{source.path}: tensor {source.spec.name!r}: {sums.overflowed} values are past the largest of {to.upper()} "
        f"(the largest is {sums.largest:g}) and would become Inf; {advice}"
    )
