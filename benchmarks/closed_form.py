"""The closed form against the rehearsal, over the whole catalogue: `make closed-form` writes docs/closed_form.md.

Every model x full, LoRA and QLoRA x three settings of levers, one device. What the rehearsal said is kept in PLACE
line by line, by the model's architecture and the settings, so a run that was stopped goes on and a new key of recipes
discards nothing; after a change of what rehearsals say, `--fresh`. The closed form is told anew each time. A family
without a row in `memory.anatomy` is told by its rough form, which promises no such accuracy, and stands in a table of
its own. Each setting is rehearsed for all models before the next: the smallest model of each family first, then the
others by their layers.

    closed_form.py [--place runs/closed_form] [--docs] [--told] [--fresh] [MODEL ...]
"""

import argparse
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.kept import Kept, key_of

from brim.errors import BrimError
from brim.memory.closed_form import closed_form
from brim.memory.rough import closed_form_knows, rough
from brim.models import ModelSpec, catalogue, describe
from brim.recipe import Recipe
from brim.rehearsal import rehearse_trace

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "closed_form.md"
MEDIAN_TARGET, WORST_TARGET = 0.03, 0.10
METHODS = {
    "full": ("method=full",),
    "lora": ("method=lora",),
    "qlora": ("method=qlora", "precision.weights=nf4"),
}
LEVERS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "plain": (2, 512, ()),
    "checkpointed": (
        4, 1024, ("memory.activation_checkpointing=full", "memory.loss=chunked", "precision.master=fp32",
                  "grad_accumulation=2"),
    ),
    "frugal": (
        1, 2048, ("memory.activation_checkpointing=selective", "optimizer.name=adamw8bit"),
    ),
}  # fmt: skip
"""Rows of a micro-batch, tokens of a row (fewer where the model knows fewer positions), settings."""

HEAD = """# Closed form against rehearsal

Written by `make closed-form`: every model of the catalogue x full, LoRA and QLoRA (NF4) x three settings of levers, in
BF16, on one CPU. The rehearsal is exact (docs/exactness.md); the closed form answers without torch, in microseconds,
and is what a search ranks by. *error* is closed form over rehearsal; the target is 3 % in the middle and 10 % at worst.

- `plain`: 2 x 512 tokens, AdamW, nothing else.
- `checkpointed`: 4 x 1024, full checkpointing, chunked loss, FP32 masters, two micro-batches a step.
- `frugal`: 1 x 2048, selective checkpointing, 8-bit AdamW.

A row has fewer tokens where the model knows fewer positions."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One recipe of one model, told both ways."""

    spec: ModelSpec
    method: str
    lever: str
    recipe: Recipe
    exact: int

    @property
    def known(self) -> bool:
        return closed_form_knows(self.spec, self.recipe)

    @property
    def error(self) -> float:
        return told(self.spec, self.recipe) / self.exact - 1


def told(spec: ModelSpec, recipe: Recipe) -> int:
    """Bytes by closed form, or roughly where the family has none."""
    form = closed_form if closed_form_knows(spec, recipe) else rough
    return form(spec, recipe).total


def recipes(spec: ModelSpec) -> Iterator[tuple[str, str, Recipe]]:
    """(method, levers, recipe) of each cell that can run."""
    for method, chosen in METHODS.items():
        for lever, (rows, tokens, settings) in LEVERS.items():
            base = Recipe(model=spec.name, task=spec.task, seq_len=min(tokens, spec.num_positions or tokens))
            wanted = [f"micro_batch_size={rows}", f"memory.attention={spec.attention}", *chosen, *settings]
            try:
                yield method, lever, base.with_settings(wanted)
            except BrimError:
                continue  # refused: the model cannot be trained so


def cheap_first(names: Sequence[str]) -> list[ModelSpec]:
    """The smallest of each family, then the others; both by their number of layers."""
    specs = sorted(map(describe, names), key=lambda spec: spec.num_parameters)
    first = {spec.model_type: spec for spec in reversed(specs)}
    return sorted(specs, key=lambda spec: (spec is not first[spec.model_type], spec.num_layers))


def cells(names: Sequence[str], kept: Kept, *, rehearses: bool) -> Iterator[Cell]:
    """What is not kept yet is rehearsed, or left out: of each setting and method all models, cheap ones first."""
    asked = [(spec, *named) for spec in cheap_first(names) for named in recipes(spec)]
    for spec, method, lever, recipe in sorted(asked, key=lambda cell: (list(LEVERS).index(cell[2]), cell[1] == "full")):
        key = key_of(spec, recipe)
        if key not in kept and rehearses:
            kept.put(key, {"cell": f"{spec.name} {method} {lever}", "bytes": _exact(spec, recipe)})
        if key in kept and (exact := kept[key]["bytes"]):
            yield Cell(spec=spec, method=method, lever=lever, recipe=recipe, exact=exact)


def _exact(spec: ModelSpec, recipe: Recipe) -> int | None:
    """None where the model's code does not run so."""
    try:
        return rehearse_trace(spec, recipe).peak_bytes
    except (BrimError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        print(f"  {spec.name} {recipe.method}: {type(error).__name__}: {error}", flush=True)
        return None


def document(found: Sequence[Cell], num_asked: int) -> str:
    known = [cell for cell in found if cell.known]
    others = [cell for cell in found if not cell.known]
    lines = [HEAD, ""]
    if len(found) < num_asked:
        lines += [
            f"Of {num_asked} cells {len(found)} have been rehearsed so far; the command goes on with the others.",
            "",
        ]
    lines += [summary(known), "", *_table(known)]
    if others:
        lines += ["", "## Families without a closed form, roughly", "", summary(others), "", *_table(others)]
    return "\n".join(lines) + "\n"


def summary(found: Sequence[Cell]) -> str:
    errors = sorted(abs(cell.error) for cell in found)
    beyond = sum(error > WORST_TARGET for error in errors)
    models = len({cell.spec.name for cell in found})
    return (
        f"{len(found)} cells of {models} models: {median(errors):.2%} in the middle, {errors[-1]:.1%} at worst, "
        f"{beyond} beyond {WORST_TARGET:.0%}."
    )


def _table(found: Sequence[Cell]) -> list[str]:
    columns = [(method, lever) for method in METHODS for lever in LEVERS]
    rows = ["| model | " + " | ".join(f"{method} {lever}" for method, lever in columns) + " |"]
    rows.append("| --- |" + " ---: |" * len(columns))
    for name in dict.fromkeys(cell.spec.name for cell in found):
        errors = {(cell.method, cell.lever): f"{cell.error:+.1%}" for cell in found if cell.spec.name == name}
        rows.append(f"| {name} | " + " | ".join(errors.get(column, "-") for column in columns) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="catalogue names; none: all")
    parser.add_argument("--place", type=Path, default=ROOT / "runs" / "closed_form")
    parser.add_argument("--told", action="store_true", help="rehearse nothing: only what is kept")
    parser.add_argument("--fresh", action="store_true", help="rehearse what is kept, too")
    parser.add_argument("--docs", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of libraries; the numbers do not depend on them
    found = []
    names = options.models or list(catalogue.entries())
    kept = Kept(options.place / "rehearsed.jsonl", fresh=options.fresh)
    for cell in cells(names, kept, rehearses=not options.told):
        found.append(cell)
        if abs(cell.error) > MEDIAN_TARGET:
            print(f"  {cell.spec.name} {cell.method} {cell.lever}: {cell.error:+.1%}", flush=True)
    for known in (True, False):
        if chosen := [cell for cell in found if cell.known is known]:
            print(f"{'closed form' if known else 'rough'}: {summary(chosen)}")
    if options.docs:
        num_asked = sum(1 for name in names for _ in recipes(describe(name)))
        DOCUMENT.write_text(document(found, num_asked), encoding="utf-8")


if __name__ == "__main__":
    main()
