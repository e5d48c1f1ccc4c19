"""The recipe that a plan ranks first against the fastest of a grid run for real: `make plan-grid`.

SmolLM2-135M on this processor, steps of 4 rows of 64 tokens: methods x formats x micro-batches x checkpointing, a few
steps each, and the plans of three memory budgets. Which cells fit a budget the rehearsal says, which is exact on a
CPU. The machine is calibrated first, as `brim doctor --calibrate` does. Each cell is kept in PLACE when it was run,
and so are the rates: a run that was stopped goes on. `--busy`: one thread and processor time, for a machine that does
other work.

    plan_grid.py [--place runs/plan_grid] [--busy] [--cells N] [--docs]
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from benchmarks.kept import Kept, key_of
from benchmarks.step_time import measured_s, processor

from brim.hardware.calibrate import operator_rates
from brim.hardware.operator_rates import OperatorRates
from brim.models import describe
from brim.planning import Constraints, NothingFitsError, Offer, plan
from brim.recipe import Recipe
from brim.rehearsal import rehearse
from brim.units import GIB, format_bytes

Method = Literal["auto", "full"]

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "plan_grid.md"
MODEL = "smollm2-135m"
SEQ_LEN = 64
BATCH = 4
"""Rows of an optimizer step: all recipes do the same work."""
TARGET = 0.10
BUDGETS = (GIB, 3 * GIB // 2, 3 * GIB)
METHODS = (
    ("method=full", "precision.weights=fp32", "precision.compute=fp32"),
    ("method=full", "precision.master=fp32"),
    ("method=full", "memory.loss=chunked"),
    ("method=lora", "precision.weights=fp32", "precision.compute=fp32"),
    ("method=lora",),
    ("method=lora", "memory.loss=chunked"),
    ("method=qlora", "precision.weights=nf4"),
)
METHODS_ASKED: tuple[Method, ...] = ("auto", "full")
ROWS = (1, 4)
CHECKPOINTING = ("none", "full")
_STEPS = 5
"""The first ones still ask the system for memory: their middle would time that."""

HEAD = """# The recipe ranked first, against a grid run for real

Written by `make plan-grid`: SmolLM2-135M on a processor, steps of 4 rows of 64 tokens. *Fastest run* is the fastest of
the grid (and of the recipe chosen) that fits the budget by rehearsal, in tokens a second of the steps that were run;
*behind* is how much slower the recipe that the plan ranked first ran than that. The target is 10 %."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A recipe that was run."""

    recipe: Recipe
    peak_bytes: int
    tokens_per_s: float

    @property
    def name(self) -> str:
        recipe, memory = self.recipe, self.recipe.memory
        words = [
            recipe.method,
            recipe.precision.weights,
            f"{recipe.grad_accumulation} x {recipe.micro_batch_size} rows",
        ]
        words += ["computed in " + recipe.precision.compute] * (recipe.precision.compute != recipe.plain_format)
        words += ["FP32 copies"] * (recipe.precision.master == "fp32")
        words += [f"{memory.activation_checkpointing} checkpointing"] * (memory.activation_checkpointing != "none")
        words += ["chunked loss"] * (memory.loss == "chunked")
        words += [recipe.optimizer.name] * (recipe.optimizer.name != "adamw")
        words += ["stepped in backward"] * recipe.optimizer.in_backward
        return ", ".join(words)


class Grid:
    """The machine, and the cells that were run on it so far."""

    def __init__(self, place: Path, *, busy: bool) -> None:
        self._clock: Callable[[], float] = time.process_time if busy else time.perf_counter
        if busy:
            torch.set_num_threads(1)
        self._kept = Kept(place / ("busy.jsonl" if busy else "cells.jsonl"))
        self._rates_file = place / ("busy_rates.json" if busy else "rates.json")
        self.spec = describe(MODEL)
        self.device = processor(self._rates())

    def missing(self, recipes: Sequence[Recipe]) -> list[Recipe]:
        return [recipe for recipe in recipes if self._key(recipe) not in self._kept]

    def run(self, recipe: Recipe) -> Cell:
        """The cell of this recipe, run where it was not yet."""
        key = self._key(recipe)
        if key not in self._kept:
            peak = rehearse(self.spec, recipe, device=self.device, budget_bytes=max(BUDGETS)).peak.highest_bytes
            seconds = measured_s(recipe, self.spec, self._clock, steps=_STEPS)
            self._kept.put(key, {"peak_bytes": peak, "seconds": seconds})
        row = self._kept[key]
        seconds = float(row["seconds"])
        return Cell(recipe=recipe, peak_bytes=row["peak_bytes"], tokens_per_s=recipe.tokens_per_step / seconds)

    def _key(self, recipe: Recipe) -> str:
        """The same for all learning rates."""
        return key_of(self.spec, replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=1e-5)))

    def first(self, budget_bytes: int, method: Method) -> Recipe | None:
        """What `brim plan` ranks first within this budget; None where nothing fits."""
        offer = Offer(device=self.device.capped(budget_bytes), budget_bytes=budget_bytes)
        try:
            found = plan(
                self.spec,
                [offer],
                rehearse=lambda recipe, offer: rehearse(
                    self.spec, recipe, device=offer.device, budget_bytes=offer.budget_bytes
                ),
                constraints=Constraints(seq_len=SEQ_LEN, global_batch_size=BATCH, method=method),
            )
        except NothingFitsError:
            return None
        return Recipe.from_dict(found.recipes[0].recipe)

    def _rates(self) -> OperatorRates:
        """Measured once a place: cells of one table are of one calibration."""
        if self._rates_file.exists():
            kept = OperatorRates.from_dict(json.loads(self._rates_file.read_text(encoding="utf-8")))
            if kept is not None:
                return kept
        rates = operator_rates(clock=self._clock)
        self._rates_file.write_text(json.dumps(rates.to_dict()), encoding="utf-8")
        return rates


def grid() -> Iterator[Recipe]:
    base = Recipe(model=MODEL, seq_len=SEQ_LEN)
    for settings, rows, kind in product(METHODS, ROWS, CHECKPOINTING):
        batch = [f"micro_batch_size={rows}", f"grad_accumulation={BATCH // rows}"]
        yield base.with_settings([*batch, f"memory.activation_checkpointing={kind}", *settings])


def compare(place: Grid, cells: Sequence[Cell], budget_bytes: int, method: Method) -> str | None:
    """A row of the table; None where nothing fits."""
    recipe = place.first(budget_bytes, method)
    if recipe is None:
        return None
    first = place.run(recipe)
    others = [cell for cell in cells if cell.peak_bytes <= budget_bytes and method in ("auto", cell.recipe.method)]
    fastest = max([*others, first], key=lambda cell: cell.tokens_per_s)
    behind = 1 - first.tokens_per_s / fastest.tokens_per_s
    words = (
        format_bytes(budget_bytes), method, str(len(others)), first.name, f"{first.tokens_per_s:.0f}",
        fastest.name, f"{fastest.tokens_per_s:.0f}", f"{behind:.1%}",
    )  # fmt: skip
    return f"| {' | '.join(words)} |"


def document(cells: Sequence[Cell], rows: Sequence[str]) -> str:
    lines = [
        HEAD, "",
        "| budget | --method | cells that fit | ranked first | tokens/s | fastest run | tokens/s | behind |",
        "| --- | --- | ---: | --- | ---: | --- | ---: | ---: |", *rows, "",
        f"## The grid: {len(cells)} recipes", "", "| recipe | peak | tokens/s |", "| --- | ---: | ---: |",
        *(f"| {c.name} | {format_bytes(c.peak_bytes)} | {c.tokens_per_s:.0f} |" for c in cells),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--place", type=Path, default=ROOT / "runs" / "plan_grid")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    parser.add_argument("--cells", type=int, help="run so many of the missing cells, and stop")
    parser.add_argument("--docs", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of libraries; the numbers do not depend on them
    place, recipes = Grid(options.place, busy=options.busy), list(grid())
    missing = place.missing(recipes)
    for recipe in missing[: options.cells]:
        cell = place.run(recipe)
        print(f"{cell.name}: {format_bytes(cell.peak_bytes)}, {cell.tokens_per_s:.0f} tokens/s", flush=True)
    if options.cells is not None and len(missing) > options.cells:
        print(f"{len(missing) - options.cells} cells to go")
        return
    cells = [place.run(recipe) for recipe in recipes]
    compared = [compare(place, cells, budget, method) for method in METHODS_ASKED for budget in BUDGETS]
    text = document(cells, [row for row in compared if row is not None])
    print(text)
    if options.docs:
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
