"""One rank of a real run: trains each case of a JSON file for a few steps and writes what its meter saw.

Not a test: `run_ranks` starts it. Arguments: cases, and the place of the answers.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from brim.memory.lifetimes import storage_of
from brim.memory.measured import CpuMeter
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.training.batches import synthetic_batch
from brim.training.build import Workload, build
from brim.training.processes import RENDEZVOUS
from brim.training.ranks import joined_ranks
from brim.training.step import train_step

STEPS = 5


def keep_gloo_apart() -> None:
    """Collectives run in a thread that the profiler does not watch, and return when gloo has let go of their tensors.

    gloo copies what it reduces and frees the copy in a thread of its own, where the profiler does not see it: watched
    halfway, its scratch memory would seem to grow from step to step.
    """
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
        setattr(dist, name, _apart(getattr(dist, name)))


def _apart(collective: Callable[..., Any]) -> Callable[..., Any]:
    def until_released(*args: Any, **kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        before = [_holders(tensor) for tensor in tensors]
        thread = threading.Thread(target=collective, args=args, kwargs=kwargs)
        thread.start()
        thread.join()
        while any(_holders(tensor) > count for tensor, count in zip(tensors, before, strict=True)):
            time.sleep(0.0005)

    return until_released


def _holders(tensor: torch.Tensor) -> int:
    """How many hold the tensor or its storage."""
    storage = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return int(tensor._use_count() + storage)  # type: ignore[attr-defined]


def run(spec: ModelSpec, recipe: Recipe) -> dict[str, Any]:
    """Losses and allocated peaks, a step each.

    Each step has a meter of its own, so that a free which is not seen does not count in the next: a peak is what was
    there before the step, and what the step put on top.
    """
    torch.manual_seed(0)
    with joined_ranks(recipe, "cpu") as ranks:
        with CpuMeter() as meter:
            workload = build(recipe, spec, ranks=ranks)
            count = recipe.grad_accumulation
            batches = [synthetic_batch(recipe, spec, seed=ranks.data_rank * count + index) for index in range(count)]
            meter.start_over()
            built_bytes, _ = meter.sample()
        built_bytes -= _state_bytes(workload)
        losses, peaks = [], []
        for _ in range(STEPS):
            before = built_bytes + _state_bytes(workload)
            with CpuMeter() as meter:
                losses.append(float(train_step(workload, batches, learning_rate=1e-3)))
                meter.sample()
            peaks.append(before + meter.peak.allocated_bytes)
        return {"losses": losses, "peaks": peaks}


def _state_bytes(workload: Workload) -> int:
    return sum(storage_of(tensor).nbytes() for tensor in workload.optimizer.tensors())


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    meet, answers = os.environ[RENDEZVOUS], []
    torch.set_num_threads(1)
    keep_gloo_apart()
    for number, case in enumerate(cases):
        os.environ[RENDEZVOUS] = f"{meet}-{number}"
        spec = ModelSpec(**case["spec"])
        answers.append(run(spec, Recipe.from_dict(case["recipe"])))
    Path(f"{sys.argv[2]}-{os.environ['RANK']}").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
