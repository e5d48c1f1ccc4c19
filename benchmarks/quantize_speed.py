"""How long FP32 -> INT8 takes, against copying the same bytes, in one run: a streaming conversion should keep near."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from brim import describe
from brim.checkpoints.convert import quantize
from brim.models.weights import local_directory

MODEL = "smollm2-135m"
ROUNDS = 3


def seconds(work: Callable[[Path], object]) -> float:
    """Time of `work` into an empty directory, its output on the disk."""
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        work(Path(directory) / "output")
        return time.perf_counter() - started


def copy(source: Path, output: Path) -> None:
    shutil.copytree(source, output, copy_function=shutil.copyfile)
    for path in output.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def main() -> None:
    source = local_directory(describe(MODEL))
    gib = sum(path.stat().st_size for path in source.iterdir()) / 2**30
    copy_s, quantize_s = [], []
    for _ in range(ROUNDS):
        copy_s.append(seconds(lambda output: copy(source, output)))
        quantize_s.append(seconds(lambda output: quantize(source, output, to="int8")))
    print(
        f"copy {gib / min(copy_s):.2f} GiB/s, FP32 -> INT8 {gib / min(quantize_s):.2f} GiB/s: "
        f"ratio {min(quantize_s) / min(copy_s):.2f} ({MODEL}, {gib:.2f} GiB, best of {ROUNDS})"
    )


if __name__ == "__main__":
    main()
