"""`make accuracy`, part three: predicted step times against throughput that others measured on GPUs and published.

The rows of data/published_peaks.csv that say tokens a second and that a recipe expresses. Nothing was fitted to any of
them, so each is held out: rates are those of the catalogue, operators those of the rehearsal.
"""

import argparse
import csv
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import median

from benchmarks.published import DATA, Case, Missing, case_of
from benchmarks.step_time import learn

from brim.errors import BrimError
from brim.rehearsal import rehearse_trace
from brim.speed import step_time
from brim.speed.bands import GPU_OPERATORS, GPU_ROOFLINE
from brim.speed.operators import OperatorMeter, gpu_seconds

TARGET = 0.15
_PROCESSES = 2
Told = dict[str, float]
"""Seconds by basis."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--learn", action="store_true", help="write the errors that ranges come from")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these rows alone, and those that ran the same")
    options = parser.parse_args()
    rows, missing = _rows()
    if options.only:
        wanted = {_key(case) for name, case, _ in rows if name in options.only}
        rows = [row for row in rows if _key(row[1]) in wanted]
    distinct = {_key(case): case for _, case, _ in rows}
    with ProcessPoolExecutor(_PROCESSES) as pool:
        told = dict(zip(distinct, pool.map(_told, distinct.values()), strict=True))
    errors: dict[str, list[tuple[str, str, float]]] = {GPU_OPERATORS: [], GPU_ROOFLINE: []}
    for name, case, measured_s in rows:
        for basis, seconds in (told[_key(case)] or {}).items():
            errors[basis].append((name, f"{case.recipe.model}, {case.recipe.method}", seconds / measured_s - 1))
    for basis, found in errors.items():
        _print(basis, found)
    print(f"  rows that no recipe expresses yet: {sum(missing.values())}")
    for what, count in missing.most_common(6):
        print(f"    {count} {what}")
    if options.learn:
        learn({basis: [(name, error) for name, _, error in found] for basis, found in errors.items()})


def _print(basis: str, found: Sequence[tuple[str, str, float]]) -> None:
    target = f" (target {TARGET:.0%})" if basis == GPU_OPERATORS else ""
    middle = median(abs(error) for *_, error in found)
    print(f"{basis}: median absolute error {middle:.1%}{target} over {len(found)} published rows")
    for kind in sorted({kind for _, kind, _ in found}):
        errors = [error for _, other, error in found if other == kind]
        middle = median(map(abs, errors))
        print(f"  {kind}: {len(errors)} rows, median {middle:.1%}, {min(errors):+.1%} to {max(errors):+.1%}")


def _rows() -> tuple[list[tuple[str, Case, float]], Counter[str]]:
    """(id, case, measured seconds of a step); and what the others lack."""
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
                own = case.recipe.tokens_per_step / case.recipe.parallel.data_ranks
                measured_s = own / float(row["tokens_per_s_per_gpu"])
                found.append((row["id"], case, measured_s))
    return found, missing


def _key(case: Case) -> tuple[str, str]:
    return case.recipe.to_toml(), case.device.name


def _told(case: Case) -> Told | None:
    """None where the model's code fails on fake tensors."""
    warnings.simplefilter("ignore")  # of libraries; the numbers do not depend on them
    meter = OperatorMeter()
    try:
        rehearse_trace(case.spec, case.recipe, device=case.device, operators=meter)
    except (BrimError, RuntimeError, ValueError, TypeError, AttributeError):
        return None
    return {
        GPU_OPERATORS: gpu_seconds(meter.work, case.spec, case.recipe, case.device),
        GPU_ROOFLINE: step_time(case.spec, case.recipe, case.device),
    }


if __name__ == "__main__":
    main()
