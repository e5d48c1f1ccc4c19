"""One rank of real runs, one after the other in one process: starting Python and torch takes longer than they do.

Not a test: `run_ranks` starts it. Arguments: a JSON file of cases, and the place of the answers. A case is a spec and a
recipe, trained on made-up rows, or the words of a `brim tune` command and the rank that is asked to stop.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from brim.cli import main as brim
from brim.cli.tune import StopSignal
from brim.memory.measured import CpuMeter
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.training.batches import synthetic_batch
from brim.training.build import build
from brim.training.processes import RENDEZVOUS
from brim.training.ranks import joined_ranks
from brim.training.step import train_step

STEPS = 3
ATTEMPTS = 3
"""Of a divided model: where cores are few, gloo's threads now and then hold a result longer than anyone waits for them.
That adds to a peak and never takes from it, so the least of them is the run's own."""


def train(spec: ModelSpec, recipe: Recipe) -> dict[str, Any]:
    """Losses of all steps and the allocated peak of a plain meter around the whole run."""
    torch.manual_seed(0)
    with joined_ranks(recipe, "cpu") as ranks, CpuMeter() as meter:
        workload = build(recipe, spec, ranks=ranks)
        count = recipe.grad_accumulation
        batches = [synthetic_batch(recipe, spec, seed=ranks.data_rank * count + index) for index in range(count)]
        meter.start_over()
        losses = []
        for _ in range(STEPS):
            losses.append(float(train_step(workload, batches, learning_rate=1e-3)))
            meter.sample()
        return {"losses": losses, "peak_bytes": meter.peak.allocated_bytes}


def least(spec: ModelSpec, recipe: Recipe) -> dict[str, Any]:
    """The attempt with the lowest peak."""
    meet, answers = os.environ[RENDEZVOUS], []
    for attempt in range(ATTEMPTS if recipe.parallel.tensor > 1 else 1):
        os.environ[RENDEZVOUS] = f"{meet}-{attempt}"
        answers.append(train(spec, recipe))
    return min(answers, key=lambda answer: int(answer["peak_bytes"]))


def tune(arguments: list[str], stop_rank: int | None, stop_step: int) -> dict[str, Any]:
    """The command's exit code. One rank alone is asked to stop after a step."""
    asked = 0

    def asked_after_step(signal: StopSignal) -> bool:
        nonlocal asked
        asked += 1  # for the first time before the first step
        return stop_rank == int(os.environ["RANK"]) and asked == stop_step + 1

    with mock.patch.object(StopSignal, "asked_after_step", asked_after_step):
        return {"code": brim(arguments)}


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    meet, answers = os.environ[RENDEZVOUS], []
    torch.set_num_threads(1)
    for number, case in enumerate(cases):
        os.environ[RENDEZVOUS] = f"{meet}-{number}"
        if "arguments" in case:
            answers.append(tune(case["arguments"], case["stop_rank"], case["stop_step"]))
        else:
            answers.append(least(ModelSpec(**case["spec"]), Recipe.from_dict(case["recipe"])))
    Path(f"{sys.argv[2]}-{os.environ['RANK']}").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
