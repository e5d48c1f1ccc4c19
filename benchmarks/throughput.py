"""`make accuracy`, part three: predicted step times against throughput that others measured on GPUs and published.

The rows of data/published_peaks.csv that say tokens a second and that a recipe expresses, and those of
data/throughput.csv (`benchmarks.reported`). Nothing was fitted to any of them, so each is held out: rates are those of
the catalogue, operators those of the rehearsal. What a rehearsed step does is kept in PLACE case by case, so a run that
was stopped goes on; `--fresh` after a change of what rehearsals say. Recipes that many rows ran come first.

    throughput.py [--place runs/throughput] [--told] [--fresh] [--processes 2] [--docs] [--learn] [--only ID ...]
"""

import argparse
import csv
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.kept import Kept, key_of
from benchmarks.published import DATA, Case, Missing, case_of
from benchmarks.reported import reported
from benchmarks.step_time import learn

from brim.errors import BrimError
from brim.rehearsal import rehearse_trace
from brim.speed import step_time
from brim.speed.bands import GPU_OPERATORS, GPU_ROOFLINE
from brim.speed.operators import OperatorMeter, StepWork, gpu_seconds

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "throughput.md"
TARGET = 0.15
"""Median absolute error."""
HEAD = """# Step times against published throughput

Written by `make accuracy DOCS=1`: tokens a second and GPU that others measured and published, as the time of a step,
against the prediction for the recipe that they ran. *operators*: the rehearsal's operators at published rates of
products and the maker's bandwidth; *roofline*: the closed form, without torch. *error* is predicted over measured
time; nothing was fitted to any row. The target is 15 % in the middle, by operators."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A published row: what ran, and the seconds of its step."""

    name: str
    case: Case
    seconds: float
    source: str

    @property
    def kind(self) -> str:
        return f"{self.case.recipe.model}, {self.case.recipe.method}"

    @property
    def key(self) -> str:
        return key_of(self.case.spec, self.case.recipe, self.case.device.name)


Errors = Mapping[str, Sequence[tuple[Measured, float]]]
"""By basis: each row, and predicted / measured - 1."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--place", type=Path, default=ROOT / "runs" / "throughput")
    parser.add_argument("--told", action="store_true", help="rehearse nothing: only what is kept")
    parser.add_argument("--fresh", action="store_true", help="rehearse what is kept, too")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--docs", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)}")
    parser.add_argument("--learn", action="store_true", help="write the errors that ranges come from")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these rows alone, and those that ran the same")
    options = parser.parse_args()
    rows, missing = published()
    if options.only:
        wanted = {row.key for row in rows if row.name in options.only}
        rows = [row for row in rows if row.key in wanted]
    kept = Kept(options.place / "works.jsonl", fresh=options.fresh)
    if not options.told:
        rehearse(rows, kept, processes=options.processes)
    waiting = sum(row.key not in kept for row in rows)
    text = document(errors_of(rows, kept), missing, waiting)
    print(text)
    if options.docs:
        DOCUMENT.write_text(text, encoding="utf-8")
    if options.learn:
        found = errors_of(rows, kept)
        learn({basis: [(row.name, error) for row, error in each] for basis, each in found.items()})


def published() -> tuple[list[Measured], Counter[str]]:
    """The rows that a recipe expresses, and what the others lack."""
    found, missing = [], Counter[str]()
    with (DATA / "published_peaks.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if not row["tokens_per_s_per_gpu"]:
                continue
            if row["task"] == "inference":
                missing["inference: no training step"] += 1
                continue
            try:
                case = case_of(row)
            except Missing as lack:
                missing[str(lack)] += 1
            else:
                source = row["source_repo_or_paper"].split("@")[0]
                rate = float(row["tokens_per_s_per_gpu"])
                found.append(_measured(row["id"], case, rate, source))
    for name, case, rate, source in reported(missing):
        found.append(_measured(name, case, rate, source))
    return found, missing


def _measured(name: str, case: Case, tokens_per_s_per_gpu: float, source: str) -> Measured:
    own = case.recipe.tokens_per_step / case.recipe.parallel.data_ranks
    return Measured(name=name, case=case, seconds=own / tokens_per_s_per_gpu, source=source)


def rehearse(rows: Sequence[Measured], kept: Kept, *, processes: int) -> None:
    """What is not kept yet; first what answers the most rows."""
    often = Counter(row.key for row in rows)
    cases = {row.key: row.case for row in sorted(rows, key=lambda row: (-often[row.key], row.case.spec.num_layers))}
    asked = {key: case for key, case in cases.items() if key not in kept}
    with ProcessPoolExecutor(processes) as pool:
        for key, work in zip(asked, pool.map(_work, asked.values()), strict=True):
            kept.put(key, {"work": work})


def _work(case: Case) -> dict[str, Any] | None:
    """What a step does; None where the model's code fails on fake tensors."""
    warnings.simplefilter("ignore")  # of libraries; the numbers do not depend on them
    meter = OperatorMeter()
    try:
        rehearse_trace(case.spec, case.recipe, device=case.device, operators=meter)
    except (BrimError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError):
        return None
    work = meter.work
    return {
        "products": [[*key, flops] for key, flops in work.products.items()],
        "attention": [[*key, flops] for key, flops in work.attention.items()],
        "passes": [[*key, nbytes] for key, nbytes in work.passes.items()],
        "num_operators": work.num_operators,
    }


def _read(work: Mapping[str, Any]) -> StepWork:
    tables = {name: {tuple(key): amount for *key, amount in work[name]} for name in ("products", "attention", "passes")}
    return StepWork(num_operators=work["num_operators"], **tables)


def errors_of(rows: Sequence[Measured], kept: Kept) -> Errors:
    """Of the rows whose case is kept; the prediction itself is told anew."""
    found: dict[str, list[tuple[Measured, float]]] = {GPU_OPERATORS: [], GPU_ROOFLINE: []}
    for row in rows:
        if row.key in kept and (work := kept[row.key]["work"]):
            for basis, seconds in _told(row.case, _read(work)):
                found[basis].append((row, seconds / row.seconds - 1))
    return found


def _told(case: Case, work: StepWork) -> Iterator[tuple[str, float]]:
    yield GPU_OPERATORS, gpu_seconds(work, case.spec, case.recipe, case.device)
    yield GPU_ROOFLINE, step_time(case.spec, case.recipe, case.device)


def document(errors: Errors, missing: Counter[str], waiting: int) -> str:
    lines = [HEAD, ""]
    if waiting:
        lines += [
            f"{waiting} rows that a recipe expresses have not been rehearsed yet; the command goes on with them.",
            "",
        ]
    for basis, found in errors.items():
        if found:
            sources = len({row.source for row, _ in found})
            middle = median(abs(error) for _, error in found)
            lines.append(f"- {basis}: {middle:.1%} in the middle, {len(found)} rows of {sources} sources.")
    lines += ["", "| source | model, method | rows | operators: median | from | to | roofline: median |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for source, kind in sorted({(row.source, row.kind) for row, _ in errors[GPU_OPERATORS]}):
        told, plain = (
            [error for row, error in errors[basis] if (row.source, row.kind) == (source, kind)]
            for basis in (GPU_OPERATORS, GPU_ROOFLINE)
        )
        lines.append(
            f"| {source} | {kind} | {len(told)} | {median(map(abs, told)):.1%} | {min(told):+.1%} | {max(told):+.1%} | "
            f"{median(map(abs, plain)):.1%} |"
        )
    lines += ["", "## Rows that no recipe expresses", "", "| rows | what is missing |", "| ---: | --- |"]
    lines += [f"| {count} | {what} |" for what, count in missing.most_common()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
