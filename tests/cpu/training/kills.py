"""`SOURCE PLACE KILLS`: a run of 60 steps killed at random moments and gone on with, until so many kills; prints what
it saw.

A process of its own, since it forks: what takes seconds to import is imported once. It never trains itself: autograd
does not go on in a child of a process that used it.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from brim.models import describe
from brim.models.quiet import quiet_transformers
from brim.recipe import Optimizer, Precision, Recipe, Training
from brim.report import Ledger, Peak, Prediction
from brim.training.data import tokenize
from brim.training.job import Run
from brim.training.layouts import Row
from brim.training.loop import run
from brim.training.start import load_tokenizer

STEPS = 60
NAMES = {"undisturbed", ".undisturbed.lock", "output", "output.partial", ".output.lock"}


def job_of(source: Path, output: Path) -> Run:
    recipe = Recipe(
        model=str(source),
        seq_len=16,
        micro_batch_size=2,
        precision=Precision(weights="fp32", compute="fp32"),
        optimizer=Optimizer(learning_rate=1e-3),
        training=Training(max_steps=STEPS, save_every=3),
    )
    prediction = Prediction(
        model=recipe.model, recipe=recipe.to_dict(), device_name="cpu", budget_bytes=2**30,
        peak=Peak(allocated_bytes=1), ledger=Ledger(weights=1), step_time_s=1.0, tokens_per_s=1.0, method="rehearsal",
        error_band=(0.0, 0.0),
    )  # fmt: skip
    tokenizer = load_tokenizer(source)
    data = tokenize([Row("", "Filled to the brim and never over it; measured twice. " * 40)], tokenizer, recipe)
    return Run(
        recipe=recipe, spec=describe(recipe.model), weights=source, tokenizer=tokenizer, data=data, output=output,
        predicted=prediction, resume=True,
    )  # fmt: skip


def ended(job: Run, after_s: float | None) -> bool:
    """Whether the run came to its end before it was killed; None lets it."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        run(job)
        os._exit(0)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == 0


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(path / "model.safetensors") for path in (one, other))
    return losses(one) == losses(other) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def main(source: Path, place: Path, kills: int) -> None:
    job = job_of(source, place / "undisturbed")
    started = time.monotonic()
    assert ended(job, None)
    whole_s = time.monotonic() - started
    output = place / "output"
    job = replace(job, output=output)
    seen = {"kills": 0, "ends": 0, "gone_on": 0, "different": 0, "strangers": 0}
    chance = random.Random(0)
    while seen["kills"] < kills or not seen["ends"]:
        seen["gone_on"] += any((place / "output.partial" / "checkpoints").glob("step-*"))
        after_s = None if seen["kills"] >= kills else chance.uniform(0, whole_s)
        seen["kills"] += not ended(job, after_s)
        seen["strangers"] += len({path.name for path in place.iterdir()} - NAMES)
        if output.exists():  # it may appear in the moment of the kill, and is whole then too
            seen["ends"] += 1
            seen["different"] += not same(place / "undisturbed", output)
            shutil.rmtree(output)
    print(json.dumps(seen))


if __name__ == "__main__":
    with quiet_transformers():
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
