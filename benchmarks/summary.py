"""Errors of predictions against published peaks, summed up."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median

from benchmarks.published import Row

from brim.memory.bands import DEFAULT_RISK, Excess, band


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One row that could be predicted."""

    row: Row
    predicted_bytes: int
    measured_bytes: int
    error: float
    """predicted / measured - 1."""
    kind_of_run: str
    card_bytes: int
    peers: Mapping[str, int]
    """What other tools' rules say, bytes by tool."""

    @property
    def told(self) -> Excess:
        """What bands are learned from."""
        return Excess(
            kind_of_run=self.kind_of_run,
            counter=self.row["memory_kind"],
            source=self.source,
            excess=self.measured_bytes / self.predicted_bytes - 1,
        )

    @property
    def source(self) -> str:
        return self.row["source_repo_or_paper"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    rows: int
    median: float
    """Of the absolute error."""
    p90: float
    bias: float
    """Median of the signed error."""
    under: float
    """Share of rows predicted below what was measured."""


def summarize(errors: Sequence[float]) -> Summary:
    sizes = sorted(abs(error) for error in errors)
    return Summary(
        rows=len(errors),
        median=median(sizes),
        p90=sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))],
        bias=median(errors),
        under=fmean(error < 0 for error in errors),
    )


def macro_average(summaries: Iterable[Summary]) -> Summary:
    """Each source counts once, however many rows it has."""
    parts = list(summaries)
    return Summary(
        rows=sum(part.rows for part in parts),
        median=fmean(part.median for part in parts),
        p90=fmean(part.p90 for part in parts),
        bias=fmean(part.bias for part in parts),
        under=fmean(part.under for part in parts),
    )


def by_kind(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Summary]]:
    """Memory kind -> source -> summary; under "all" every row, under "macro" the mean of the sources."""
    found: dict[str, dict[str, Summary]] = {}
    for kind in sorted({outcome.row["memory_kind"] for outcome in outcomes}):
        rows = [outcome for outcome in outcomes if outcome.row["memory_kind"] == kind]
        sources = {
            source: summarize([outcome.error for outcome in rows if outcome.source == source])
            for source in sorted({outcome.source for outcome in rows})
        }
        found[kind] = {
            **sources,
            "all": summarize([outcome.error for outcome in rows]),
            "macro": macro_average(sources.values()),
        }
    return found


def above_bounds(outcomes: Sequence[Outcome], *, risk: float = DEFAULT_RISK) -> tuple[float, float]:
    """Share of rows measured above their upper bound: learned from all rows, and from those of other sources alone."""
    rows = [outcome.told for outcome in outcomes if outcome.row["memory_kind"] != "unspecified"]
    if not rows:
        return 0.0, 0.0
    sources = {row.source for row in rows}
    inside = _share_above(rows, rows, risk)
    if len(sources) == 1:
        return inside, inside
    apart = [
        ([row for row in rows if row.source == source], [row for row in rows if row.source != source])
        for source in sources
    ]
    return inside, sum(len(own) * _share_above(own, others, risk) for own, others in apart) / len(rows)


def _share_above(rows: Sequence[Excess], learned: Sequence[Excess], risk: float) -> float:
    highest = {kind: band(learned, kind, risk=risk)[1] for kind in {row.kind_of_run for row in rows}}
    return fmean(row.excess > highest[row.kind_of_run] for row in rows)


def to_dict(summaries: Mapping[str, Mapping[str, Summary]]) -> dict[str, dict[str, float]]:
    return {kind: asdict(parts["all"]) for kind, parts in summaries.items()}


def reason(outcome: Outcome) -> str:
    """What is known to be modelled otherwise than it ran; it explains, it does not excuse."""
    row, source = outcome.row, outcome.source
    if (
        outcome.row["memory_kind"] in ("nvidia-smi", "unspecified")
        and outcome.measured_bytes > 0.88 * outcome.card_bytes
    ):
        return "the card is nearly full: when cached segments go back depends on what the driver and others hold"
    if source.startswith("modelscope"):
        return "not explained: grows by about 50 bytes a logit; ms-swift's metrics and Qwen's own code are not modelled"
    if source.startswith("QwenLM") and row["task"] == "inference":
        return "not explained: published is weights, cache and workspace; the prompt's feed-forward left no trace in it"
    if source.startswith("QwenLM"):
        return "which counter was read is not said; Qwen's own code (full: 24 bytes a parameter) rehearsed as Qwen2"
    if source.startswith("Lightning-AI"):
        if row["parallelism"].startswith("fsdp"):
            return (
                "the longest row came first, when no whole gradient was there yet; how long later ones were is not said"
            )
        return "not explained: the code of mid-2023, before litgpt's versions on PyPI"
    if row["source_path_or_url"].endswith("/a100_80gb.csv") and row["memory_kind"] == "nvidia-smi":
        return "1.65 GiB lie beside PyTorch's allocator in each run of this file, 0.5 in the others of the same card"
    if row["memory_kind"] == "nvidia-smi":
        return "reserved depends on the order of every allocation since the start: loading, warm-up and evaluation too"
    return "not explained"
