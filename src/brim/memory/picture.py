"""Ledgers as bars beside each other: who owns the bytes at the peak. Needs matplotlib (`pip install 'brim[plot]'`)."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from brim.report import LEDGER_LINES, Ledger
from brim.units import GIB, format_bytes

# Okabe and Ito's palette: told apart by colour-blind readers, too. One colour per ledger line, in its order.
_COLOURS = dict(
    zip(
        LEDGER_LINES,
        ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#999999", "#F0E442", "#000000"),
        strict=True,
    )
)
_NARROWEST_LABEL = 0.08
"""Share of the axis under which a part has no room for its size."""
_SMALLEST_NAMED = 0.001
"""Share of the peak under which a line is too thin to see, and not named."""


def draw_ledgers(path: Path, *, title: str, bars: Mapping[str, Ledger], budget_bytes: int | None = None) -> None:
    """Write one horizontal stacked bar per ledger to FILE.svg or FILE.png, with a line at the budget."""
    figure = Figure(figsize=(9, 1.5 + 0.75 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    extent = round(1.04 * max(budget_bytes or 0, *(ledger.total for ledger in bars.values())))
    for row, ledger in enumerate(bars.values()):
        _draw_bar(axes, row, ledger, extent)
    if budget_bytes is not None:
        axes.axvline(budget_bytes / GIB, color="black", linestyle="--", linewidth=1)
        axes.text(
            budget_bytes / GIB, -0.5, f"budget {format_bytes(budget_bytes)} ", ha="right", va="center", fontsize=9
        )
    labels = [f"{name}\n{format_bytes(ledger.total)}" for name, ledger in bars.items()]
    axes.set_yticks(range(len(bars)), labels)
    axes.set_ylim(len(bars) - 0.5, -0.7)
    axes.set_xlabel("GiB at the peak")
    axes.set_xlim(0, extent / GIB)
    axes.set_title(title, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles = [Patch(color=_COLOURS[line], label=line) for line in LEDGER_LINES if _is_seen(line, bars)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    with rc_context({"svg.hashsalt": "brim"}):
        # no date in the file: the same ledgers give the same picture
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _is_seen(line: str, bars: Mapping[str, Ledger]) -> bool:
    return any(getattr(ledger, line) > _SMALLEST_NAMED * ledger.total for ledger in bars.values())


def _draw_bar(axes: Axes, row: int, ledger: Ledger, extent: int) -> None:
    start = 0
    for line, nbytes in ledger.to_dict().items():
        axes.barh(row, nbytes / GIB, left=start / GIB, color=_COLOURS[line], height=0.6)
        if nbytes > _NARROWEST_LABEL * extent:
            middle = (start + nbytes / 2) / GIB
            axes.text(middle, row, format_bytes(nbytes), ha="center", va="center", color="white", fontsize=9)
        start += nbytes
