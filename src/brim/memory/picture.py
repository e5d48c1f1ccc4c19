"""Ledgers as bars beside each other: who owns the bytes at the peak. Needs matplotlib (`pip install 'brim[plot]'`)."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

from brim.report import LEDGER_LINES, Ledger
from brim.units import GIB, format_bytes

matplotlib.use("agg")

from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers, too. One colour per ledger line, in its order.
_COLOURS = dict(
    zip(
        LEDGER_LINES,
        ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#999999", "#F0E442", "#000000"),
        strict=True,
    )
)
_NARROWEST_LABEL = 0.06
"""Share of the longest bar under which a part has no room for its size."""


def draw_ledgers(path: Path, *, title: str, bars: Mapping[str, Ledger], budget_bytes: int | None = None) -> None:
    """Write one horizontal stacked bar per ledger to FILE.svg or FILE.png, with a line at the budget."""
    figure = Figure(figsize=(9, 1.5 + 0.75 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    longest = max(ledger.total for ledger in bars.values())
    for row, ledger in enumerate(bars.values()):
        _draw_bar(axes, row, ledger, longest)
    if budget_bytes is not None:
        axes.axvline(budget_bytes / GIB, color="black", linestyle="--", linewidth=1)
        axes.text(budget_bytes / GIB, -0.62, f" budget {format_bytes(budget_bytes)}", va="center", fontsize=9)
    labels = [f"{name}\n{format_bytes(ledger.total)}" for name, ledger in bars.items()]
    axes.set_yticks(range(len(bars)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("GiB allocated at the peak")
    axes.set_xlim(0, 1.08 * max(longest, budget_bytes or 0) / GIB)
    axes.set_title(title, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    used = [line for line in LEDGER_LINES if any(getattr(ledger, line) for ledger in bars.values())]
    handles = [matplotlib.patches.Patch(color=_COLOURS[line], label=line) for line in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(used), frameon=False, fontsize=9)
    with matplotlib.rc_context({"svg.hashsalt": "brim"}):
        # no date in the file: the same ledgers give the same picture
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_bar(axes: matplotlib.axes.Axes, row: int, ledger: Ledger, longest: int) -> None:
    start = 0
    for line, nbytes in ledger.to_dict().items():
        axes.barh(row, nbytes / GIB, left=start / GIB, color=_COLOURS[line], height=0.6)
        if nbytes > _NARROWEST_LABEL * longest:
            middle = (start + nbytes / 2) / GIB
            axes.text(middle, row, format_bytes(nbytes), ha="center", va="center", color="white", fontsize=9)
        start += nbytes
