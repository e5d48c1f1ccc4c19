"""How long a rehearsal takes: against one real step of the same recipe, and of models that nothing here could hold.

The large ones are asked for twice: spliced from short models, as `brim predict` does, and with every block run (for
the largest in the time of its blocks, which takes over a minute, only with --whole).
"""

import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout

from brim import Recipe, cli, describe
from brim.hardware import find
from brim.rehearsal import rehearse_trace, whole_trace
from brim.speed.operators import OperatorMeter
from brim.training.batches import synthetic_batch
from brim.training.build import build
from brim.training.step import train_step

RECIPE = Recipe(model="smollm2-135m", seq_len=256, micro_batch_size=2).with_settings(
    ["precision.weights=fp32", "precision.compute=fp32"]
)
GPU = "h100"
LARGE = {
    "8B, LoRA, one GPU": Recipe(model="llama-3.1-8b", seq_len=4096).with_settings(["method=lora"]),
    "8B, full, one GPU": Recipe(model="llama-3.1-8b", seq_len=4096),
    "70B, full, ZeRO-3 on 64 x 8 GPUs": Recipe(model="llama-3.1-70b", seq_len=4096).with_settings(
        ["parallel.sharding=zero3", "parallel.nodes=64", "parallel.devices_per_node=8",
         "memory.activation_checkpointing=full"]
    ),
}  # fmt: skip


def main() -> None:
    against_a_real_step()
    for name, recipe in LARGE.items():
        spliced_s = large(recipe, rehearse_trace)
        whole = ""
        if recipe.parallel.devices == 1 or "--whole" in sys.argv:
            whole_s = large(recipe, whole_trace)
            whole = f", every block run {whole_s:.2f} s: ratio {spliced_s / whole_s:.2f}"
        print(f"rehearsal of {name}: {spliced_s:.2f} s{whole}")
    asked_again()


def large(recipe: Recipe, trace: Callable[..., object]) -> float:
    """Seconds of a rehearsal with all that `brim predict` asks of it."""
    spec, started = describe(recipe.model), time.perf_counter()
    trace(spec, recipe, device=find(GPU), operators=OperatorMeter())
    return time.perf_counter() - started


def asked_again() -> None:
    """The command itself, its imports done, on a question that it has answered before."""
    question = ["predict", "llama-3.1-8b", "--gpu", GPU, "--method", "lora", "--seq-len", "4096", "--json"]
    seconds = []
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place
        for _ in range(4):
            started = time.perf_counter()
            with redirect_stdout(io.StringIO()):
                cli.main(question)
            seconds.append(time.perf_counter() - started)
    print(f"brim {' '.join(question[:4])}: {seconds[0]:.2f} s, asked again {1000 * min(seconds[1:]):.0f} ms")


def against_a_real_step() -> None:
    spec = describe(RECIPE.model)
    rehearse_trace(spec, RECIPE)  # Imports and caches are paid once in a process; a plan rehearses many recipes.
    started = time.perf_counter()
    rehearse_trace(spec, RECIPE)
    rehearsal_s = time.perf_counter() - started

    workload, batch = build(RECIPE, spec), synthetic_batch(RECIPE, spec)
    step_s = []
    for _ in range(3):
        started = time.perf_counter()
        train_step(workload, [batch], learning_rate=1e-5)
        step_s.append(time.perf_counter() - started)
    print(
        f"rehearsal {rehearsal_s:.2f} s, real step {min(step_s):.2f} s: ratio {rehearsal_s / min(step_s):.2f} "
        f"({RECIPE.model}, {RECIPE.micro_batch_size} x {RECIPE.seq_len}, FP32)"
    )


if __name__ == "__main__":
    main()
