"""Rehearsed against measured peaks for every family and lever, as a table: `make exactness` writes docs/exactness.md.

Each cell builds the model for real on the CPU with random weights, runs two optimizer steps under PyTorch's profiler,
and compares its allocation peak with the rehearsal of the same recipe. Method, precision, checkpointing and loss are
combined in full; accumulation and attention alternate so that each meets every value of every other lever. Levers that
are not in this matrix run one by one, moment by moment (exactness_moments.py). What was run is kept in PLACE line by
line, so that a matrix that was stopped goes on: without PLACE, all of it is run.

    exactness.py [--place runs/exactness] [FAMILY ...]    without names: all families, and the document is written
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from benchmarks.exactness_moments import LEVERS, MOMENTS, Run, run, runs

from brim.models import ModelSpec
from brim.recipe import Recipe, Task
from brim.rehearsal import rehearse_trace
from brim.training.trial import measured_trial

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "exactness.md"
CLASSIFIERS = ("bert", "roberta", "llama", "gpt-2", "mixtral", "bloom")
TARGET = 0.001

HEAD = """# Rehearsed against measured

Written by `make exactness`: small models of each family with random weights, two optimizer steps each, on a CPU, one
thread. *Predicted* is the rehearsal's peak, *measured* the allocation peak that PyTorch's profiler reports for the same
recipe run for real; bytes. The target is 0.1 % in every cell.

What the rehearsal does not see, and how much it is:

- **Numbers that autograd keeps**: 8 bytes for each multiplication of a tensor that needs a gradient by a Python number
  (an adapter's scale, attention's scale): the few hundred bytes in most rows with LoRA.
- **What large operators take inside themselves.** Casts are counted at any size; what oneDNN packs operands of 16-bit
  products into is asked of the processor by running the operator once on zeros, up to 2^31 multiplications and 64 MiB.
  So predictions for a CPU are for the processor that makes them; another one packs otherwise.

Experts: transformers' default (`grouped_mm`) sorts tokens by expert and multiplies all of them in one operator, so its
sizes do not depend on the routing; the trainer and the rehearsal both use it. The routing here is that of random
weights; a test holds that another one takes the same memory. LoRA over all linears adapts the experts, too: PEFT then
keeps a merged copy of each block's experts until backward, which is predicted as it runs (31B parameters: 58 GiB)
and can be avoided by `lora.targets` that leave the experts out."""

HEAD_OF_MOMENTS = """Levers that the matrix does not combine, in runs of Llama, GPT-2, Qwen3-MoE and T5 in FP32
and in BF16. Weights are loaded from files, two steps taken, a loss evaluated, a checkpoint saved, and adapters merged:
each of these moments has a peak of its own."""

METHODS = ("full", "lora")
PRECISIONS = {
    "fp32": ("fp32", "fp32", "none"),
    "bf16": ("bf16", "bf16", "none"),
    "mixed": ("fp32", "bf16", "none"),
    "bf16 + fp32": ("bf16", "bf16", "fp32"),
    "fp16 + fp32": ("fp16", "fp16", "fp32"),
}
CHECKPOINTING = ("none", "full")
LOSSES = ("full", "chunked")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One recipe of one family, predicted and measured."""

    recipe: Recipe
    precision: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def row(self) -> str:
        recipe, memory = self.recipe, self.recipe.memory
        words = (
            recipe.method, self.precision, memory.activation_checkpointing, memory.loss, memory.attention,
            str(recipe.grad_accumulation), f"{self.predicted:,}", f"{self.measured:,}",
            f"{self.predicted - self.measured:+,}", f"{100 * self.error:+.4f} %",
        )  # fmt: skip
        return f"| {' | '.join(words)} |"


def recipes(spec: ModelSpec, task: Task) -> Iterator[tuple[str, Recipe]]:
    losses = LOSSES[:1] if task == "sequence-classification" else LOSSES
    axes = (enumerate(METHODS), enumerate(PRECISIONS), enumerate(CHECKPOINTING), enumerate(losses))
    for (m, method), (p, precision), (c, checkpointing), (k, loss) in product(*axes):
        weights, compute, master = PRECISIONS[precision]
        if compute == "fp16" and task == "seq2seq-lm":
            continue  # refused
        eager = (m + k + p // 2) % 2 == 1
        settings = (
            f"method={method}", f"precision.weights={weights}", f"precision.compute={compute}",
            f"precision.master={master}", f"memory.activation_checkpointing={checkpointing}", f"memory.loss={loss}",
            f"memory.attention={'eager' if eager else spec.attention}", f"grad_accumulation={1 + (c + k + p) % 2}",
        )  # fmt: skip
        base = Recipe(model=spec.name, task=task, seq_len=96, micro_batch_size=2)
        yield precision, base.with_settings(settings)


class Kept:
    """What was run, line by line in a file, so that the next asking knows it; without a place, nothing is kept."""

    def __init__(self, place: Path | None) -> None:
        self._file = None if place is None else place / "cells.jsonl"
        self._values: dict[str, Any] = {}
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
        if self._file is not None and self._file.exists():
            lines = self._file.read_text(encoding="utf-8").splitlines()
            self._values = dict(map(json.loads, lines))

    def get(self, key: str, work: Callable[[], Any]) -> Any:
        if key not in self._values:
            self._values[key] = work()
            if self._file is not None:
                with self._file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps([key, self._values[key]]) + "\n")
        return self._values[key]


def cell(spec: ModelSpec, precision: str, recipe: Recipe, kept: Kept) -> Cell:
    predicted, measured = kept.get(
        f"{spec.name} {recipe.to_toml()}",
        lambda: (rehearse_trace(spec, recipe).peak_bytes, measured_trial(spec, recipe).peak.allocated_bytes),
    )
    return Cell(recipe=recipe, precision=precision, predicted=predicted, measured=measured)


def moments(specs: Sequence[ModelSpec], kept: Kept) -> list[Run]:
    """Runs of levers one by one; those that are refused are said, and left out."""
    found = []
    for spec, lever, precision in runs(specs):
        key = f"{spec.name}, {lever}, {precision}"
        peaks = kept.get(key, partial(run, spec, lever, precision))
        if peaks is None:
            print(f"refused: {key}", flush=True)
            continue
        predicted, measured = peaks
        found.append(Run(family=spec.name, lever=lever, precision=precision, predicted=predicted, measured=measured))
        if found[-1].largest_error > TARGET:
            print("  ", found[-1].row, flush=True)
    return found


def cases(names: list[str]) -> Iterator[tuple[ModelSpec, Task]]:
    for name, config in json.loads((HERE / "families.json").read_text(encoding="utf-8")).items():
        if names and name not in names:
            continue
        tied = config.get("tie_word_embeddings", True)
        spec = ModelSpec(name=name, kind="directory", config=config, num_parameters=1, tied_head=tied)
        yield spec, spec.task
        if name in CLASSIFIERS:
            yield spec, "sequence-classification"


def line(name: str, errors: Sequence[float]) -> str:
    within = sum(error <= TARGET for error in errors)
    return f"| {name} | {len(errors)} | {within} | {100 * median(errors):.4f} % | {100 * max(errors):.4f} % |"


def table(columns: Sequence[str], rows: Iterable[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}", *rows]


def summary(sections: dict[str, list[Cell]]) -> list[str]:
    everything = [cell for found in sections.values() for cell in found]
    groups = {**sections, "all": everything, "all in FP32": [cell for cell in everything if cell.precision == "fp32"]}
    rows = [line(name, [abs(cell.error) for cell in found]) for name, found in groups.items()]
    return table(("family, task", "cells", "within 0.1 %", "median", "largest"), rows)


def summary_of_moments(found: Sequence[Run]) -> list[str]:
    groups = {lever: [run for run in found if run.lever == lever] for lever in LEVERS} | {"all": list(found)}
    rows = [
        line(name, [abs(error) for run in group for error in run.errors.values()])
        for name, group in groups.items()
        if group
    ]
    return table(("lever", "moments", "within 0.1 %", "median", "largest"), rows)


def document(sections: dict[str, list[Cell]], found: Sequence[Run]) -> str:
    text = [HEAD, "", *summary(sections), "", HEAD_OF_MOMENTS, "", *summary_of_moments(found)]
    for name, cells in sections.items():
        columns = (
            "method", "precision", "checkpointing", "loss", "attention", "micro-batches", "predicted", "measured",
            "difference", "relative",
        )  # fmt: skip
        text += ["", f"## {name}", "", *table(columns, (cell.row for cell in cells))]
    heads = ("family", "lever", "precision", "highest predicted", "measured", *MOMENTS)
    text += ["", "## Moments: error in %", "", *table(heads, (run.row for run in found))]
    return "\n".join([*text, ""])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="FAMILY")
    parser.add_argument("--place", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    kept, sections = Kept(asked.place), {}
    found = moments([spec for spec, task in cases(asked.names) if task == spec.task], kept)
    for text in summary_of_moments(found):
        print(text, flush=True)
    for spec, task in cases(asked.names):
        name = f"{spec.name}, {task}"
        sections[name] = [cell(spec, precision, recipe, kept) for precision, recipe in recipes(spec, task)]
        print(line(name, [abs(cell.error) for cell in sections[name]]), flush=True)
        for each in sections[name]:
            if abs(each.error) > TARGET:
                print("  ", each.row, flush=True)
    if not asked.names:
        DOCUMENT.write_text(document(sections, found), encoding="utf-8")
        print(f"written: {DOCUMENT.name}")


main()
