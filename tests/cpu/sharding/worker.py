"""One rank of a real run: trains each case of a JSON file for a few steps and writes what its meter saw.

Not a test: `run_ranks` starts it. Arguments: cases, and the place of the answers.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from brim.memory.measured import CpuMeter
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.training.batches import synthetic_batch
from brim.training.build import build
from brim.training.processes import RENDEZVOUS
from brim.training.ranks import joined_ranks
from brim.training.step import train_step

STEPS = 4


def give_gloo_time() -> None:
    """gloo's threads hold the tensors of a collective for a moment after it is done; wait until they have let go."""
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
        setattr(dist, name, _and_wait(getattr(dist, name)))


def _and_wait(collective: Callable[..., Any]) -> Callable[..., Any]:
    def waiting(*args: Any, **kwargs: Any) -> Any:
        work = collective(*args, **kwargs)
        time.sleep(0.003)
        return work

    return waiting


def run(spec: ModelSpec, recipe: Recipe) -> dict[str, Any]:
    """Losses, and the lowest of the peaks of the steps after the first (see test_sharding)."""
    torch.manual_seed(0)
    with joined_ranks(recipe, "cpu") as ranks, CpuMeter() as meter:
        workload = build(recipe, spec, ranks=ranks)
        count = recipe.grad_accumulation
        batches = [synthetic_batch(recipe, spec, seed=ranks.data_rank * count + index) for index in range(count)]
        meter.start_over()
        losses, peaks = [], []
        for _ in range(STEPS):
            losses.append(float(train_step(workload, batches, learning_rate=1e-3)))
            peaks.append(meter.sample()[1])
        return {"losses": losses, "peaks": peaks, "ledger": meter.ledger.to_dict()}


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    meet, answers = os.environ[RENDEZVOUS], []
    torch.set_num_threads(1)
    give_gloo_time()
    for number, case in enumerate(cases):
        os.environ[RENDEZVOUS] = f"{meet}-{number}"
        spec = ModelSpec(**case["spec"])
        answers.append(run(spec, Recipe.from_dict(case["recipe"])))
    Path(f"{sys.argv[2]}-{os.environ['RANK']}").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
