"""Memory over time by owner: what `--plot` draws below the ledger. No torch, no matplotlib."""

from dataclasses import dataclass

from brim.memory.trace import Trace, line_of
from brim.report import LEDGER_LINES

_MOMENTS = 800
"""More than a picture has columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Bytes by ledger line at some moments, the highest of each stretch of events."""

    moments: list[int]
    """Events so far."""
    lines: dict[str, list[int]]
    peak: int
    """Which of the moments is the highest."""


def timeline(trace: Trace) -> Timeline:
    """The trace in at most 800 moments; its peak is one of them."""
    stretch = max(1, -(-len(trace.events) // _MOMENTS))
    now = dict.fromkeys(LEDGER_LINES, 0)
    total = 0
    moments: list[int] = []
    columns: list[dict[str, int]] = []
    totals: list[int] = []
    for index, (allocated, block) in enumerate(trace.events, start=1):
        change = block.nbytes if allocated else -block.nbytes
        now[line_of(block.line)] += change
        total += change
        if (index - 1) % stretch == 0:
            moments.append(index)
            columns.append(dict(now))
            totals.append(total)
        elif total > totals[-1]:
            moments[-1], columns[-1], totals[-1] = index, dict(now), total
    lines = {line: [column[line] for column in columns] for line in LEDGER_LINES}
    return Timeline(moments=moments, lines=lines, peak=totals.index(max(totals)))
