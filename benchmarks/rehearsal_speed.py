"""How long a rehearsal takes, against one real step of the same recipe, in one run."""

import time

from brim import Recipe, describe
from brim.rehearsal import rehearse_trace
from brim.training.batches import synthetic_batch
from brim.training.build import build
from brim.training.step import train_step

RECIPE = Recipe(model="smollm2-135m", seq_len=256, micro_batch_size=2).with_settings(
    ["precision.weights=fp32", "precision.compute=fp32"]
)


def main() -> None:
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
