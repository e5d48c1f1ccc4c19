"""`make accuracy`, part four: torchtune's published table of levers, one after another, against predictions.

Llama-3.2-3B, 2 rows of 4096 tokens, BF16, A100 (rows tune-009 to tune-018 of data/published_peaks.csv). The target: the
levers in the published order, and each peak within 10 %. The rows are expressed by `published.case_of`, as all others
are; packed rows keep the mask that packing takes. The baseline ran Alpaca's own rows, whose lengths are not told: its
peak is that of the optimizer's step, the same for all lengths up to SHORT.
"""

import argparse
import csv
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from benchmarks.published import DATA, Case, Missing, Row, case_of, measured_bytes

from brim.rehearsal import peak_on, rehearse_trace
from brim.units import GIB

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "levers.md"
TARGET = 0.10
SHORT = 256
"""Tokens of a row of the baseline's rehearsal."""
LEVERS: Mapping[str, str] = {
    "tune-009": "baseline",
    "tune-010": "+ packed dataset",
    "tune-011": "+ compile",
    "tune-012": "+ chunked cross-entropy",
    "tune-013": "+ activation checkpointing",
    "tune-014": "+ optimizer step in backward",
    "tune-015": "+ activation offloading",
    "tune-016": "+ 8-bit AdamW",
    "tune-017": "LoRA",
    "tune-018": "QLoRA",
}

HEAD = """# torchtune's table of levers

Written by `make accuracy DOCS=1` (benchmarks/levers.py): Llama-3.2-3B, 2 rows of 4096 tokens, BF16, one A100; each row
adds a lever to the one before, the last two take adapters instead of the optimizer's levers. *Published* is the peak of
active memory in torchtune's README, *predicted* the rehearsal's allocated peak. Nothing is fitted: what compiling
a block or the loss keeps is said in `library.norm`, `library.activation` and `library.cross_entropy`. The baseline's
rows were Alpaca's own, of unknown length; its peak is the optimizer's step whatever the length, as long as rows are
short."""


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One row of the table."""

    name: str
    published: int
    predicted: int | None
    """None where no recipe says it yet."""
    lacks: str = ""

    @property
    def error(self) -> float | None:
        return None if self.predicted is None else self.predicted / self.published - 1


def levers() -> list[Lever]:
    with (DATA / "published_peaks.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file) if row["id"] in LEVERS}
    return [_lever(name, rows[key]) for key, name in LEVERS.items()]


def _lever(name: str, row: Row) -> Lever:
    published = measured_bytes(row)
    try:
        case = lever_case(row)
    except Missing as lack:
        return Lever(name=name, published=published, predicted=None, lacks=str(lack))
    trace = rehearse_trace(case.spec, case.recipe, device=case.device)
    peak, _ = peak_on(case.device, trace, case.recipe)
    return Lever(name=name, published=published, predicted=peak.allocated_bytes)


def lever_case(row: Row) -> Case:
    """The row's recipe; all but the baseline read packed rows."""
    if not row["seq_len"].isdigit():
        return case_of({**row, "seq_len": str(SHORT)})
    case = case_of(row)
    training = replace(case.recipe.training, packing=True)
    return replace(case, recipe=replace(case.recipe, training=training))


def same_order(found: Sequence[Lever]) -> bool:
    """Whether each lever moves the peak the way it was published to."""
    told = [lever for lever in found if lever.predicted is not None]
    return all(
        (after.published > before.published) == ((after.predicted or 0) > (before.predicted or 0))
        for before, after in pairwise(told)
    )


def table(found: Sequence[Lever]) -> list[str]:
    lines = ["| lever | published | predicted | error |", "| --- | ---: | ---: | ---: |"]
    for lever in found:
        predicted = "-" if lever.predicted is None else f"{lever.predicted / GIB:.1f} GiB"
        error = lever.lacks if lever.error is None else f"{lever.error:+.1%}"
        lines.append(f"| {lever.name} | {lever.published / GIB:.1f} GiB | {predicted} | {error} |")
    return lines


def verdict(found: Sequence[Lever]) -> str:
    errors = [abs(lever.error) for lever in found if lever.error is not None]
    order = "the published one" if same_order(found) else "not the published one"
    within = sum(error <= TARGET for error in errors)
    return (
        f"Order of levers: {order}. {within} of {len(found)} within {TARGET:.0%}; the worst is {max(errors):.1%} off."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true", help=f"write docs/{DOCUMENT.name}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of libraries; the numbers do not depend on them
    found = levers()
    print("\n".join([*table(found), "", verdict(found)]))
    if options.docs:
        DOCUMENT.write_text("\n".join([HEAD, "", *table(found), "", verdict(found)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
