"""`make accuracy`, part two: predicted step times against ten steps run for real on this processor.

Every recipe is rehearsed with the rates of this machine, measured in the same run, and then run. `--busy`: one thread,
and processor time instead of the clock's, for a machine that does other work; a step takes then what it would alone.
`--learn` writes the errors that ranges come from; the rates hold no constant that was fitted to these recipes.
"""

import argparse
import csv
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from brim.hardware import Device
from brim.hardware.calibrate import operator_rates
from brim.hardware.operator_rates import SIZES, OperatorRates, key
from brim.models import ModelSpec, describe
from brim.recipe import Recipe
from brim.rehearsal import rehearse_trace
from brim.speed import step_time
from brim.speed.bands import CPU_ROOFLINE, OPERATORS
from brim.speed.operators import OperatorMeter
from brim.training.batches import synthetic_batch
from brim.training.build import build
from brim.training.step import train_step

ROOT = Path(__file__).resolve().parent.parent
ERRORS = ROOT / "src" / "brim" / "speed" / "data" / "step_errors.csv"
TARGET = 0.20
"""Median absolute error."""
_STEPS = 3
_FP32 = ("precision.weights=fp32", "precision.compute=fp32")
RECIPES: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("smollm2-135m", 128, 2, _FP32),
    ("smollm2-135m", 128, 2, ()),
    ("smollm2-135m", 128, 2, ("method=lora",)),
    ("smollm2-135m", 128, 2, ("precision.weights=fp32",)),
    ("smollm2-135m", 256, 1, ("precision.master=fp32", "memory.activation_checkpointing=full")),
    ("gpt2", 64, 2, _FP32),
    ("pythia-160m", 256, 2, ("method=lora",)),
    ("t5-small", 128, 4, _FP32),
    ("pythia-70m", 128, 4, ("optimizer.name=sgd",)),
    ("opt-125m", 128, 4, ("memory.loss=chunked",)),
)
"""Model, tokens of a row, rows, settings: families, formats, methods and levers, each step about a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    name: str
    measured_s: float
    predicted_s: dict[str, float]
    """By basis."""

    def error(self, basis: str) -> float:
        return self.predicted_s[basis] / self.measured_s - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    parser.add_argument("--learn", action="store_true", help=f"write the errors to {ERRORS.name}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of libraries; the numbers do not depend on them
    if options.busy:
        torch.set_num_threads(1)
    clock = time.process_time if options.busy else time.perf_counter
    rates = operator_rates(clock=clock)
    timed = []
    for model, seq_len, rows, settings in RECIPES:
        timed.append(_timed(model, seq_len, rows, settings, rates, clock))
        row = timed[-1]
        told = ", ".join(
            f"{basis} {row.predicted_s[basis]:.2f} s ({row.error(basis):+.0%})" for basis in row.predicted_s
        )
        print(f"{row.name}: measured {row.measured_s:.2f} s; {told}", flush=True)
    how = "one thread, processor time, on a busy machine" if options.busy else f"{torch.get_num_threads()} threads"
    print(f"\nMedian absolute error of the step's time over {len(timed)} recipes run for real ({how}):")
    for basis in (OPERATORS, CPU_ROOFLINE):
        middle = median(abs(row.error(basis)) for row in timed)
        print(f"  {basis}: {middle:.1%}" + (f" (target {TARGET:.0%})" if basis == OPERATORS else ""))
    if options.learn:
        learn({basis: [(row.name, row.error(basis)) for row in timed] for basis in (OPERATORS, CPU_ROOFLINE)})


def learn(errors: dict[str, list[tuple[str, float]]]) -> None:
    """Replace these bases' rows by measured / predicted - 1."""
    with ERRORS.open(encoding="utf-8", newline="") as file:
        kept = [row for row in csv.DictReader(file) if row["basis"] not in errors]
    with ERRORS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["basis", "id", "error"])
        writer.writerows((row["basis"], row["id"], row["error"]) for row in kept)
        for basis, rows in errors.items():
            writer.writerows((basis, name, f"{1 / (1 + error) - 1:.4f}") for name, error in rows)


def _timed(
    model: str, seq_len: int, rows: int, settings: tuple[str, ...], rates: OperatorRates, clock: Callable[[], float]
) -> Timed:
    spec = describe(model)
    recipe = Recipe(model=model, task=spec.task, seq_len=seq_len, micro_batch_size=rows)
    recipe = recipe.with_settings([f"memory.attention={spec.attention}", *settings])
    meter = OperatorMeter()
    rehearse_trace(spec, recipe, operators=meter)
    predicted = {OPERATORS: meter.work.seconds(rates), CPU_ROOFLINE: step_time(spec, recipe, processor(rates))}
    words = [setting.partition("=")[2] for setting in settings]
    return Timed(
        name=" ".join([model, f"{rows}x{seq_len}", *words]),
        measured_s=measured_s(recipe, spec, clock, steps=_STEPS),
        predicted_s=predicted,
    )


def measured_s(recipe: Recipe, spec: ModelSpec, clock: Callable[[], float], *, steps: int) -> float:
    """Seconds of a step: the middle of so many after the first."""
    workload = build(recipe, spec)
    batches = [synthetic_batch(recipe, spec, seed=index) for index in range(recipe.grad_accumulation)]
    seconds = []
    for _ in range(steps + 1):
        start = clock()
        train_step(workload, batches, learning_rate=1e-5)
        seconds.append(clock() - start)
    return median(seconds[1:])


def processor(rates: OperatorRates) -> Device:
    """This machine by these rates: as the roofline sees it (one peak for each format, one bandwidth), and by operator;
    its memory is no bound."""
    fp32, bf16 = (rates.rates[key("square", name)] for name in ("fp32", "bf16"))
    return Device(
        name="cpu",
        kind="cpu",
        memory_bytes=2**35,
        memory_free_bytes=2**35,
        flops={"fp32": fp32, "bf16": bf16, "fp16": bf16},
        bandwidth_bytes_per_s=rates.rates[key("in-place", "fp32", SIZES[-1])],
        cores=torch.get_num_threads(),
        operators=rates,
    )


if __name__ == "__main__":
    main()
