"""Predictions that were made before, kept on the disk: the same question again takes milliseconds, and no torch.

A file for each answer, named by the SHA-256 of all that decides it: recipe, model, device, risk, Brim's own source and
the versions of the libraries that a rehearsal runs. What changes between two askings (the memory that is free, the
user's own runs) is no part of it and is put in anew. A file that is damaged is no answer. The oldest go when there are
too many.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from brim.cache import cache_directory
from brim.hardware.device import Device
from brim.models.spec import ModelSpec
from brim.publish import write_whole
from brim.recipe import Recipe
from brim.report import Prediction
from brim.speed.bands import time_range

LIMIT = 1000
"""Answers that are kept, of 2 to 3 KiB each."""
_LIBRARIES = ("brim", "torch", "transformers", "peft", "bitsandbytes", "accelerate")
"""Whose code a rehearsal runs."""


def question(spec: ModelSpec, recipe: Recipe, device: Device, *, risk: float, new_tokens: int | None = None) -> str:
    """Names all that decides a prediction but what is put in anew; `new_tokens`: of writing, not of training."""
    memory = 0 if device.kind == "cpu" else device.memory_bytes  # a GPU's allocator gives back what nears its end
    asked = replace(device, memory_bytes=memory, memory_free_bytes=0)
    facts = (recipe, spec, asked, risk, new_tokens, _code())
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def recall(key: str, recipe: Recipe, device: Device, *, budget_bytes: int) -> Prediction | None:
    """The answer to this question, within this budget; None where there is none, or a damaged one."""
    path = answers_directory() / key
    try:
        checksum, _, text = path.read_text(encoding="utf-8").partition("\n")
        if checksum != _checksum(text):
            return None
        kept = Prediction.from_dict(json.loads(text))
        now = time.time_ns()  # `touch` has the clock tick's time, which other files may share
        os.utime(path, ns=(now, now))  # asked for: not among the oldest
    except (OSError, ValueError, KeyError, TypeError):
        return None
    seconds, basis = kept.step_time_s, kept.step_time_basis
    spread = time_range(seconds, basis=basis, identity=device.identity) if basis else None
    return replace(kept, recipe=recipe.to_dict(), budget_bytes=budget_bytes, step_time_range_s=spread)


def keep(key: str, prediction: Prediction) -> None:
    """Answer this question from now on. A disk that refuses costs the next asking its time, no more."""
    text = json.dumps(prediction.to_dict())
    try:
        write_whole(answers_directory() / key, f"{_checksum(text)}\n{text}")
        _drop_oldest(answers_directory())
    except OSError:
        return


def answers_directory() -> Path:
    return cache_directory() / "answers"


def _drop_oldest(directory: Path) -> None:
    found = [(path.stat().st_mtime_ns, path) for path in directory.iterdir()]
    for _, path in sorted(found)[: max(0, len(found) - LIMIT)]:
        path.unlink(missing_ok=True)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _code() -> str:
    """What would answer: versions, and Brim's files, which change without their version where it is developed."""
    return repr((*map(_version, _LIBRARIES), *_source()))


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _source() -> Iterator[tuple[str, int, int]]:
    """Name, size and time of change of Brim's files."""
    package = Path(__file__).parent
    for path in sorted(package.rglob("*")):
        if path.suffix != ".pyc" and path.is_file():
            status = path.stat()
            yield str(path.relative_to(package)), status.st_size, status.st_mtime_ns
