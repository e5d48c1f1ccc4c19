"""Ledgers as bars beside each other: who owns the bytes at the peak. Needs matplotlib (`pip install 'brim[plot]'`)."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from brim.memory.timeline import Timeline, timeline
from brim.memory.trace import Trace
from brim.report import LEDGER_LINES, Ledger
from brim.units import GIB, format_bytes

# Okabe and Ito's palette: told apart by colour-blind readers, too. One colour per ledger line, in its order.
COLOURS = dict(
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


def draw_ledgers(
    path: Path,
    *,
    title: str,
    bars: Mapping[str, Ledger],
    budget_bytes: int | None = None,
    trace: Trace | None = None,
    below: Sequence[Callable[[Axes], None]] = (),
) -> None:
    """Write one horizontal stacked bar per ledger to FILE.svg, .png or .html, with a line at the budget.

    With a trace, memory over time by owner stands below; `below` draws further panels, one each.
    """
    height = 1.5 + 0.75 * len(bars)
    over_time = [] if trace is None else [lambda axes: _draw_timeline(axes, timeline(trace), budget_bytes)]
    panels = [*over_time, *below]
    figure = Figure(figsize=(9, height + 3.6 * len(panels)), layout="constrained")
    ratios = (height, *(4.2 for _ in panels))
    axes, *others = figure.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
    for panel, draw in zip(others, panels, strict=True):
        draw(panel)
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
    drawn = {line for line in LEDGER_LINES if _is_seen(line, bars)}
    if trace is not None:
        drawn |= {line for line, heights in timeline(trace).lines.items() if max(heights) > 0.01 * trace.peak_bytes}
    handles = [Patch(color=COLOURS[line], label=line) for line in LEDGER_LINES if line in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    save(figure, path, title)


def save(figure: Figure, path: Path, title: str) -> None:
    """Write FILE.svg, .png or .html. A page is the drawing itself between two tags: it needs no network."""
    with rc_context({"svg.hashsalt": "brim"}):
        if path.suffix != ".html":
            # no date in the file: the same figures give the same picture
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
            return
        drawing = StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    svg = drawing.getvalue()
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
    path.write_text(f"{head}<body>{svg[svg.index('<svg') :]}</body></html>\n", encoding="utf-8")


def _draw_timeline(axes: Axes, seen: Timeline, budget_bytes: int | None) -> None:
    """Stacked areas in the ledger's order, the highest moment marked."""
    heights = [[nbytes / GIB for nbytes in seen.lines[line]] for line in LEDGER_LINES]
    axes.stackplot(seen.moments, heights, colors=[COLOURS[line] for line in LEDGER_LINES], linewidth=0, step="post")
    moment, peak = seen.moments[seen.peak], sum(line[seen.peak] for line in heights)
    axes.plot([moment], [peak], marker="v", color="black", markersize=7, clip_on=False)
    late = moment > 0.6 * seen.moments[-1]
    axes.annotate(
        f"peak {format_bytes(round(peak * GIB))}", (moment, peak), xytext=(-8 if late else 8, 5),
        textcoords="offset points", ha="right" if late else "left", fontsize=9,
    )  # fmt: skip
    top = peak
    if budget_bytes is not None:
        axes.axhline(budget_bytes / GIB, color="black", linestyle="--", linewidth=1)
        top = max(top, budget_bytes / GIB)
    axes.set_ylim(0, 1.15 * top)
    axes.set_xlim(0, seen.moments[-1])
    axes.set_xlabel("allocations and frees, in order")
    axes.set_ylabel("GiB allocated")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _is_seen(line: str, bars: Mapping[str, Ledger]) -> bool:
    return any(getattr(ledger, line) > _SMALLEST_NAMED * ledger.total for ledger in bars.values())


def _draw_bar(axes: Axes, row: int, ledger: Ledger, extent: int) -> None:
    start = 0
    for line, nbytes in ledger.to_dict().items():
        axes.barh(row, nbytes / GIB, left=start / GIB, color=COLOURS[line], height=0.6)
        if nbytes > _NARROWEST_LABEL * extent:
            middle = (start + nbytes / 2) / GIB
            axes.text(
                middle, row, format_bytes(nbytes), ha="center", va="center", color=_ink(COLOURS[line]), fontsize=9
            )
        start += nbytes


def _ink(background: str) -> str:
    """Black or white, whichever is read better on this colour (Rec. 709 luminance)."""
    red, green, blue = to_rgb(background)
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else "white"
