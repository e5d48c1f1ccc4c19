"""Plans at random budgets, run for real: `make budgets` writes docs/budgets.md.

Budgets lie evenly (by their logarithm) between the lightest and the heaviest recipe of SmolLM2-135M's blocks, LAYERS of
its 30, random weights, rows of 128 tokens, four a step. Of each plan the recipe that is ranked first takes two real
steps under PyTorch's profiler: it must take no more than the budget. Of the recipes that are said not to fit, those
nearest above the budget are rehearsed (which docs/exactness.md holds to 0.1 % of what is measured): none may take less
than the budget by more than 2 %. Each recipe is run once and kept in PLACE, so what was stopped goes on.

    budgets.py [--place runs/budgets] [--plans 50] [--layers 4] [--losers 6] [--docs]
"""

import argparse
import json
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from brim.errors import RecipeError
from brim.hardware.detect import detect_host
from brim.hardware.rates import quick_device
from brim.models import ModelSpec, describe
from brim.planning import Constraints, NothingFitsError, Offer, plan
from brim.planning.candidates import candidates
from brim.planning.estimate import estimate, lower_bound
from brim.recipe import Recipe
from brim.rehearsal import rehearse
from brim.report import Prediction
from brim.training.trial import measured_trial

DOCUMENT = Path(__file__).parent.parent / "docs" / "budgets.md"
CONSTRAINTS = Constraints(seq_len=128, global_batch_size=4)
ROOM = 1.02
"""What is said not to fit may fit by this much."""
MIB = 2**20
NEVER_BYTES = 2**62
"""Of a recipe that does not go with the model: it fits nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One budget."""

    budget_bytes: int
    recipe: str
    """In a few words; empty where nothing fits."""
    predicted_bytes: int
    measured_bytes: int
    wrongly_refused: tuple[str, ...]
    """Recipes that were said not to fit and do, by more than 2 %."""
    num_refused: int
    """As many that were said not to fit were looked at."""

    @property
    def exceeds(self) -> bool:
        return self.measured_bytes > self.budget_bytes


class Kept:
    """Bytes by question, a line each in a file; what is not there is found out and added."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._known: dict[str, int] = dict(json.loads(line) for line in lines)
        self._path = path

    def of(self, question: str, answer: Callable[[], int]) -> int:
        if question not in self._known:
            self._known[question] = answer()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([question, self._known[question]]) + "\n")
        return self._known[question]


class Bench:
    """One model on this machine's processor."""

    def __init__(self, layers: int, place: Path) -> None:
        self.spec = shortened(layers, place)
        self.device = quick_device("cpu", detect_host().memory_bytes)
        self.recipes = candidates(self.spec, CONSTRAINTS.on(self.device, devices_per_node=1, nodes=1))
        self._kept = Kept(place / f"layers-{layers}.jsonl")

    def rehearsed_bytes(self, recipe: Recipe) -> int:
        def answer() -> int:
            try:
                found = rehearse(self.spec, recipe, device=self.device, budget_bytes=self.device.memory_bytes)
            except RecipeError:  # INT4 by 128 over 576 inputs, which a plan considers and the layers refuse
                return NEVER_BYTES
            return found.peak.allocated_bytes

        return self._kept.of(f"rehearsed {recipe}", answer)

    def measured_bytes(self, recipe: Recipe) -> int:
        return self._kept.of(f"measured {recipe}", lambda: measured_trial(self.spec, recipe).peak.allocated_bytes)

    def predicted(self, recipe: Recipe, budget_bytes: int) -> Prediction:
        """The closed form's answer with the rehearsed peak, which is kept: a plan asks for the same ones many times."""
        quick = self._quick(recipe, budget_bytes)
        peak = replace(quick.peak, allocated_bytes=self.rehearsed_bytes(recipe))
        return replace(quick, peak=peak, method="rehearsal", error_band=(-0.001, 0.001))

    def best(self, budget_bytes: int) -> Recipe | None:
        """What a plan ranks first."""
        try:
            found = plan(
                self.spec,
                [Offer(device=self.device, budget_bytes=budget_bytes)],
                rehearse=lambda recipe, offer: self.predicted(recipe, offer.budget_bytes),
                constraints=CONSTRAINTS,
            )
        except NothingFitsError:
            return None
        return None if found.best is None else Recipe.from_dict(found.best.recipe)

    def row(self, budget_bytes: int, num_losers: int) -> Row:
        recipe = self.best(budget_bytes)
        refused = self._nearest_refused(budget_bytes, num_losers)
        fits = [loser for loser in refused if self.rehearsed_bytes(loser) * ROOM < budget_bytes]
        return Row(
            budget_bytes=budget_bytes,
            recipe="" if recipe is None else in_words(recipe),
            predicted_bytes=0 if recipe is None else self.rehearsed_bytes(recipe),
            measured_bytes=0 if recipe is None else self.measured_bytes(recipe),
            wrongly_refused=tuple(in_words(loser) for loser in fits),
            num_refused=len(refused),
        )

    def _nearest_refused(self, budget_bytes: int, count: int) -> list[Recipe]:
        """Of the recipes that a plan leaves alone, since by closed form they cannot fit, those nearest above."""
        quick = [(lower_bound(self._quick(recipe, budget_bytes)), in_words(recipe), recipe) for recipe in self.recipes]
        losers = sorted((found for found in quick if found[0] > budget_bytes), key=lambda found: found[:2])
        return [recipe for _, _, recipe in losers[:count]]

    def _quick(self, recipe: Recipe, budget_bytes: int) -> Prediction:
        return estimate(self.spec, recipe, device=self.device, budget_bytes=budget_bytes)

    def budgets(self, count: int) -> list[int]:
        """Random ones between the lightest and the heaviest recipe, by closed form and then rehearsed."""
        by_size = sorted(self.recipes, key=lambda recipe: self._quick(recipe, 1).peak.allocated_bytes)
        low, high = self.rehearsed_bytes(by_size[0]), self.rehearsed_bytes(by_size[-1])
        chance = random.Random(0)
        return [round(math.exp(chance.uniform(math.log(low), math.log(high)))) for _ in range(count)]


def shortened(layers: int, place: Path) -> ModelSpec:
    """SmolLM2-135M with fewer blocks: a directory's config, by which everything else is counted anew."""
    directory = place / f"smollm2-{layers}-blocks"
    directory.mkdir(parents=True, exist_ok=True)
    config = {**describe("smollm2-135m").config, "num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return describe(str(directory))


def in_words(recipe: Recipe) -> str:
    memory, optimizer = recipe.memory, recipe.optimizer
    parts = [
        recipe.method,
        f"{recipe.precision.weights}/{recipe.precision.compute}/{recipe.precision.master}",
        optimizer.name + (" in backward" if optimizer.in_backward else ""),
        f"{recipe.micro_batch_size} x {recipe.grad_accumulation}",
        f"checkpointing {memory.activation_checkpointing}",
        f"loss {memory.loss}",
    ]
    return ", ".join(parts)


def document(rows: list[Row], layers: int) -> str:
    exceeded = [row for row in rows if row.exceeds]
    wrong = sum(len(row.wrongly_refused) for row in rows)
    looked = sum(row.num_refused for row in rows)
    lines = [
        "# Plans at random budgets, run for real",
        "",
        f"Written by `make budgets`: SmolLM2-135M's blocks ({layers} of 30), rows of 128 tokens, four a step, random",
        "weights, on a CPU, one thread. *Measured*: the allocation peak of two real steps of the recipe ranked first.",
        "",
        f"- {len(rows)} budgets from the lightest to the heaviest recipe: {len(exceeded)} runs took more than theirs.",
        f"- Of {looked} recipes nearest above a budget, said not to fit, {wrong} would have fitted by more than 2 %.",
        "",
        "| budget MiB | ranked first | predicted MiB | measured MiB | of the budget | said not to fit, and fit |",
        "| ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for row in sorted(rows, key=lambda row: row.budget_bytes):
        used = f"{100 * row.measured_bytes / row.budget_bytes:.1f} %" if row.recipe else ""
        sizes = [f"{size / MIB:.1f}" if size else "" for size in (row.predicted_bytes, row.measured_bytes)]
        fit = "; ".join(row.wrongly_refused)
        lines.append(
            f"| {row.budget_bytes / MIB:.1f} | {row.recipe or 'nothing'} | {sizes[0]} | {sizes[1]} | {used} | {fit} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--place", type=Path, default=Path("runs/budgets"))
    for name, default in (("plans", 50), ("layers", 4), ("losers", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--docs", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    bench, rows = Bench(asked.layers, asked.place), list[Row]()
    for budget_bytes in bench.budgets(asked.plans):
        rows.append(bench.row(budget_bytes, asked.losers))
        last = rows[-1]
        print(
            f"{len(rows):3}  {last.budget_bytes / MIB:8.1f} MiB  measured {last.measured_bytes / MIB:8.1f}  "
            f"{'EXCEEDS' if last.exceeds else ''}  wrongly refused {len(last.wrongly_refused)}  {last.recipe}",
            flush=True,
        )
    text = document(rows, asked.layers)
    if asked.docs:
        DOCUMENT.write_text(text, encoding="utf-8")
    print("\n".join(text.splitlines()[5:8]))


if __name__ == "__main__":
    main()
