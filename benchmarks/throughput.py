"""`make accuracy`, part three: predicted step times against throughput that others measured on GPUs and published.

The rows of data/published_peaks.csv that say tokens a second and that a recipe expresses, and those of
data/throughput.csv (`benchmarks.reported`). No device's rate was fitted to them; how long the host takes was, and is
judged by leaving sources out. What a rehearsed step does is kept in PLACE case by case, so a run that
was stopped goes on; `--fresh` after a change of what rehearsals say.

    throughput.py [--place runs/throughput] [--told] [--fresh] [--processes 2] [--docs] [--learn] [--only ID ...]
"""

import argparse
import csv
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import host_times
from benchmarks.host_times import Step
from benchmarks.kept import Kept, key_of
from benchmarks.published import DATA, Case, Missing, Row, case_of
from benchmarks.reported import reported
from benchmarks.step_time import learn

from brim.errors import BrimError
from brim.rehearsal import rehearse_trace
from brim.speed import step_time
from brim.speed.bands import GPU_OPERATORS, GPU_ROOFLINE
from brim.speed.gpu import HostTimes, gpu_seconds, parts_of
from brim.speed.kernels import Kernel
from brim.speed.operators import OperatorMeter, StepWork

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "throughput.md"
TARGET = 0.15
"""Median absolute error."""
HEAD = """# Step times against published throughput

Written by `make accuracy DOCS=1`: tokens a second and GPU that others measured and published, as the time of a step,
against the prediction for the recipe that they ran. *operators*: the rehearsal's kernels at published rates, or the
host's time for asking for them where that is longer (`speed/gpu.py`); *roofline*: the closed form, without torch.
*error* is predicted over measured time. The target is 15 % in the middle, by operators."""


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
    text = document(errors_of(rows, kept), steps_of(rows, kept), missing, waiting)
    print(text)
    if options.docs:
        DOCUMENT.write_text(text, encoding="utf-8")
    if options.learn:
        steps = steps_of(rows, kept)
        host_times.write(host_times.learned(steps), steps)
        plain = [(row.name, error) for row, error in errors_of(rows, kept)[GPU_ROOFLINE]]
        # ranges are for models that taught nothing
        learn({GPU_OPERATORS: host_times.left_out(steps, model_of), GPU_ROOFLINE: plain})


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
                case = _as_run(case_of(_with_length(row)), row)
            except Missing as lack:
                missing[str(lack)] += 1
            else:
                source = row["source_repo_or_paper"].split("@")[0]
                rate = float(row["tokens_per_s_per_gpu"])
                found.append(_measured(row["id"], case, rate, source))
    for name, case, rate, source in reported(missing):
        found.append(_measured(name, case, rate, source))
    return found, missing


def _with_length(row: Row) -> Row:
    """Rows that were not packed have no one length: their note tells the mean, tokens over samples, padding counted."""
    told = re.search(r"train_tokens_per_second/train_samples_per_second=(\d+) .*so x(\d+) GPUs", row["notes"])
    return row if row["seq_len"] or not told else {**row, "seq_len": str(int(told[1]) * int(told[2]))}


def _as_run(case: Case, row: Row) -> Case:
    """What takes time and no memory: fms-acceleration's fused kernels leave adapters out of FSDP
    (fused_ops_and_kernels, `ignore_modules_in_fsdp`)."""
    if not (case.recipe.adapts and case.recipe.library.sharding == "fsdp1" and "foak" in row["notes"]):
        return case
    return replace(case, recipe=case.recipe.with_settings(["library.adapter_units=none"]))


def _measured(name: str, case: Case, tokens_per_s_per_gpu: float, source: str) -> Measured:
    own = case.recipe.tokens_per_step / case.recipe.parallel.data_ranks
    return Measured(name=name, case=case, seconds=own / tokens_per_s_per_gpu, source=source)


def rehearse(rows: Sequence[Measured], kept: Kept, *, processes: int) -> None:
    """What is not kept yet, each kind's turn after another's: a run that is stopped has seen something of each."""
    cases = {row.key: row.case for row in _in_turn(rows)}
    asked = {key: case for key, case in cases.items() if key not in kept}
    with ProcessPoolExecutor(processes) as pool:
        for key, work in zip(asked, pool.map(_work, asked.values()), strict=True):
            kept.put(key, {"work": work})


def _in_turn(rows: Sequence[Measured]) -> list[Measured]:
    """Rows of each source, model, method, device and number of devices in turn."""
    turns = defaultdict[tuple[object, ...], list[Measured]](list)
    for row in rows:
        device, devices = row.case.device.name, row.case.recipe.parallel.devices
        turns[row.source, row.kind, device, devices].append(row)
    return [row for turn in zip_longest(*turns.values()) for row in turn if row is not None]


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
        "kernels": [[*key, count] for key, count in _unnamed(work.kernels).items()],
        "num_operators": work.num_operators,
    }


def _unnamed(kernels: Mapping[Kernel, float]) -> Mapping[tuple[Any, ...], float]:
    """Without the operators' names, which take room and no time."""
    found = defaultdict[tuple[Any, ...], float](float)
    for kernel, count in kernels.items():
        found[kernel[1:]] += count
    return found


def _read(work: Mapping[str, Any]) -> StepWork:
    products, attention, passes, kernels = (
        {tuple(key): amount for *key, amount in work[name]} for name in ("products", "attention", "passes", "kernels")
    )
    return StepWork(
        products=products,
        attention=attention,
        passes=passes,
        kernels={Kernel("", *key): count for key, count in kernels.items()},
        num_operators=work["num_operators"],
    )


def errors_of(rows: Sequence[Measured], kept: Kept) -> Errors:
    """Of the rows whose case is kept; the prediction itself is told anew."""
    found: dict[str, list[tuple[Measured, float]]] = {GPU_OPERATORS: [], GPU_ROOFLINE: []}
    for row in rows:
        if row.key in kept and (work := kept[row.key]["work"]):
            for basis, seconds in _told(row.case, _read(work)):
                found[basis].append((row, seconds / row.seconds - 1))
    return found


def steps_of(rows: Sequence[Measured], kept: Kept) -> list[Step]:
    """Of the rows whose case is kept, a run that was published with several peaks once."""
    found: dict[tuple[str, float], Step] = {}
    for row in rows:
        if row.key in kept and (work := kept[row.key]["work"]):
            case = row.case
            parts = parts_of(_read(work), case.spec, case.recipe, case.device)
            step = Step(name=row.name, source=row.source, case=case, seconds=row.seconds, parts=parts)
            found.setdefault((row.key, row.seconds), step)
    return list(found.values())


def model_of(step: Step) -> str:
    return step.case.recipe.model


def _told(case: Case, work: StepWork) -> Iterator[tuple[str, float]]:
    yield GPU_OPERATORS, gpu_seconds(work, case.spec, case.recipe, case.device)
    yield GPU_ROOFLINE, step_time(case.spec, case.recipe, case.device)


def document(errors: Errors, steps: Sequence[Step], missing: Counter[str], waiting: int) -> str:
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
    lines += _judged(steps) if len({step.source for step in steps}) > 1 else []
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


def _judged(steps: Sequence[Step]) -> list[str]:
    """What of it carries to rows that taught nothing."""
    lines = []
    for group, name in ((model_of, "model"), (lambda step: step.source, "source")):
        errors = [abs(error) for _, error in host_times.left_out(steps, group)]
        held = host_times.covered(steps, group)
        lines.append(
            f"- {len(steps)} runs, the host's times by other {name}s' runs alone: {median(errors):.1%} in the middle; "
            f"the range that the others' errors give, of four of five, holds {held:.0%}."
        )
    none = HostTimes(python_s=0.0, engine_s=0.0, unit_s=0.0)
    lines.append(f"- Without a host: {median(abs(step.error(none)) for step in steps):.1%}.")
    return lines


if __name__ == "__main__":
    main()
