"""`make accuracy`: predictions against peaks that others measured on GPUs and published.

ROWS: a file of the columns of data/published_peaks.csv; OUT: where to write the summary as JSON; DOCS: the Markdown.
"""

import argparse
import csv
import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import peers
from benchmarks.published import DATA, Case, Missing, Row, case_of, measured_bytes, read
from benchmarks.summary import Outcome, Summary, above_bounds, by_kind, reason, summarize, to_dict
from rich.console import Console

from brim.errors import BrimError
from brim.memory.allocator import replay
from brim.memory.bands import kind_of_run
from brim.memory.trace import Trace
from brim.rehearsal import peak_on, rehearse_trace, written_trace
from brim.report import Peak

WORST = 10
_PROCESSES = 2
_Key = tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=DATA / "published_peaks.csv")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--learn", type=Path, help="write the errors that prediction bands come from")
    parser.add_argument("--peaks", type=Path, help="where peaks of this very code are kept, to go on after a stop")
    options = parser.parse_args()
    outcomes, missing = predict_all(read(options.rows), options.peaks)
    summaries = by_kind(outcomes)
    text = markdown(outcomes, summaries, missing)
    Console(width=200, highlight=False, soft_wrap=True).print(text, markup=False)
    if options.out is not None:
        options.out.write_text(json.dumps(to_dict(summaries), indent=1) + "\n", encoding="utf-8")
    if options.docs is not None:
        options.docs.write_text(text, encoding="utf-8")
    if options.learn is not None:
        learn(outcomes, options.learn)


def learn(outcomes: Sequence[Outcome], path: Path) -> None:
    """The errors of rows that say which counter was read, as `brim.memory.bands` reads them."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kind_of_run", "kind", "source", "id", "error"])
        for outcome in outcomes:
            if outcome.row["memory_kind"] != "unspecified":
                told = outcome.told
                writer.writerow([told.kind_of_run, told.counter, told.source, outcome.row["id"], f"{told.excess:.5f}"])


def predict_all(rows: Sequence[Row], kept: Path | None = None) -> tuple[list[Outcome], Counter[str]]:
    """Outcomes of the rows that can be predicted, and how many others lack what. Equal recipes are rehearsed once."""
    cases: list[tuple[Row, Case]] = []
    missing: Counter[str] = Counter()
    for row in rows:
        try:
            cases.append((row, case_of(row)))
        except Missing as lack:
            missing[str(lack)] += 1
    distinct = {_key(case): case for _, case in cases}
    peaks = _peaks(distinct, kept)
    outcomes = []
    for row, case in cases:
        peak = peaks[_key(case)]
        if isinstance(peak, str):
            missing[peak] += 1
        else:
            outcomes.append(_outcome(row, case, peak))
    return outcomes, missing


def _peaks(cases: Mapping[_Key, Case], kept: Path | None) -> dict[_Key, Peak | str]:
    """Of each case; `kept` has a line for each that is known, and gets one for each that is not."""
    known: dict[_Key, Peak | str] = {}
    if kept is not None and kept.exists():
        for line in kept.read_text(encoding="utf-8").splitlines():
            key, peak = json.loads(line)
            known[tuple(key)] = peak if isinstance(peak, str) else Peak(**peak)
    asked = {key: case for key, case in cases.items() if key not in known}
    with ProcessPoolExecutor(_PROCESSES) as pool, (kept or Path(os.devnull)).open("a", encoding="utf-8") as file:
        for key, peak in zip(asked, pool.map(_peak, asked.values()), strict=True):
            known[key] = peak
            file.write(json.dumps([key, peak if isinstance(peak, str) else asdict(peak)]) + "\n")
            file.flush()
    return known


def _key(case: Case) -> _Key:
    return case.recipe.to_toml(), case.device.name, str(case.writing)


def _peak(case: Case) -> Peak | str:
    """The peaks, or why there are none."""
    warnings.simplefilter("ignore")  # of libraries; the numbers do not depend on them
    try:
        if case.writing is not None:
            trace = written_trace(case.spec, case.recipe, case.writing, device=case.device).trace
        else:
            trace = rehearse_trace(case.spec, case.recipe, device=case.device)
            peak = peak_on(case.device, trace, case.recipe)[0]
            return _as_sampled(case, trace, peak)
        return peak_on(case.device, trace, case.recipe)[0]
    except BrimError as error:
        return str(error)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"the model's code fails on fake tensors: {type(error).__name__}: {str(error).splitlines()[0]}"


def _as_sampled(case: Case, trace: Trace, peak: Peak) -> Peak:
    """Where the card was full once, what nvidia-smi shows when asked each second (fms-acceleration's benchmark.py,
    memory_log_interval_secs): from a failed request until unused segments are back is a moment that no sample meets.
    Where it is full in each step, all samples are near it."""
    assert peak.reserved_bytes is not None and peak.device_bytes is not None
    beside = peak.device_bytes - peak.reserved_bytes
    limit = case.device.memory_bytes - beside
    if not replay(trace, limit_bytes=limit).num_retries:
        return peak
    third, fourth = (
        replay(rehearse_trace(case.spec, case.recipe, steps=steps, device=case.device), limit_bytes=limit)
        for steps in (3, 4)
    )
    return (
        replace(peak, device_bytes=fourth.settled_bytes + beside) if third.num_retries == fourth.num_retries else peak
    )


def of_kind(peak: Peak, kind: str) -> int:
    """The peak that a counter of this kind shows; "unspecified" is compared with reserved."""
    if kind in ("allocated", "active"):
        return peak.allocated_bytes
    reserved, device = peak.reserved_bytes, peak.device_bytes
    assert reserved is not None and device is not None
    return device if kind == "nvidia-smi" else reserved


def _outcome(row: Row, case: Case, peak: Peak) -> Outcome:
    predicted, measured = of_kind(peak, row["memory_kind"]), measured_bytes(row)
    return Outcome(
        row=row,
        predicted_bytes=predicted,
        measured_bytes=measured,
        error=predicted / measured - 1,
        kind_of_run=kind_of_run(case.recipe, inference=case.writing is not None),
        card_bytes=case.device.memory_bytes,
        peers=peers.peers(case, row),
    )


def markdown(outcomes: Sequence[Outcome], summaries: Mapping[str, Mapping[str, Summary]], missing: Counter[str]) -> str:
    num_rows = len(outcomes) + sum(missing.values())
    inside, outside = above_bounds(outcomes)
    lines = [
        "# Accuracy on published GPU peaks",
        "",
        f"Written by `make accuracy`: {len(outcomes)} of {num_rows} well-specified rows are rehearsed. "
        "Error: predicted / measured - 1; bias: its median; under: rows predicted too low. macro: the mean of the "
        "sources. No constant was fitted to a row.",
        "",
        f"{100 * inside:.1f} % of the rows that say their counter lie above the upper bound at the default risk, which "
        f"was learned from them; {100 * outside:.1f} % where a source's bound is learned from the other sources alone.",
        "",
        "| kind | source | rows | median | 90th percentile | bias | under |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, parts in summaries.items():
        lines += [_line(kind, source, part) for source, part in parts.items()]
    lines += [
        "",
        "## Other tools' rules on the same rows",
        "",
        "| tool | kind | rows | median | 90th percentile | bias |",
    ]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |", *_peer_lines(outcomes, summaries)]
    lines += ["", "## The worst rows", "", "| row | kind | predicted GiB | measured GiB | error | reason |"]
    lines += ["| --- | --- | ---: | ---: | ---: | --- |"]
    for outcome in sorted(outcomes, key=lambda outcome: -abs(outcome.error))[:WORST]:
        lines.append(
            f"| {outcome.row['id']} {outcome.row['model']} | {outcome.row['memory_kind']} | "
            f"{outcome.predicted_bytes / 2**30:.2f} | {outcome.measured_bytes / 2**30:.2f} | "
            f"{100 * outcome.error:+.1f} % | {reason(outcome)} |"
        )
    lines += ["", "## Rows that no recipe expresses yet", "", "| rows | what is missing |", "| ---: | --- |"]
    lines += [f"| {count} | {what} |" for what, count in missing.most_common()]
    return "\n".join(lines) + "\n"


def _line(kind: str, source: str, part: Summary) -> str:
    return (
        f"| {kind} | {source} | {part.rows} | {100 * part.median:.2f} % | {100 * part.p90:.2f} % | "
        f"{100 * part.bias:+.2f} % | {100 * part.under:.0f} % |"
    )


def _peer_lines(outcomes: Sequence[Outcome], summaries: Mapping[str, Mapping[str, Summary]]) -> list[str]:
    lines = []
    for kind, parts in summaries.items():
        rows = [outcome for outcome in outcomes if outcome.row["memory_kind"] == kind]
        tools = {"Brim": parts["all"]}
        for tool in dict.fromkeys(tool for outcome in rows for tool in outcome.peers):
            # a rule of training says nothing of inference
            told = [outcome for outcome in rows if tool in outcome.peers]
            tools[tool] = summarize([outcome.peers[tool] / outcome.measured_bytes - 1 for outcome in told])
        lines += [
            f"| {tool} | {kind} | {part.rows} | {100 * part.median:.1f} % | {100 * part.p90:.1f} % | "
            f"{100 * part.bias:+.1f} % |"
            for tool, part in tools.items()
        ]
    return lines


if __name__ == "__main__":
    main()
