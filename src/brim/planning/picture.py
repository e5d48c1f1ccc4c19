"""Curves as a picture: the peak by owner, and the memory there is. Needs matplotlib (`pip install 'brim[plot]'`)."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from brim.memory.picture import COLOURS, save
from brim.planning.curves import SHOWN, Curve
from brim.planning.estimate import upper_bound
from brim.report import LEDGER_LINES, Prediction
from brim.units import GIB, format_bytes

_SEEN = 0.03
"""Share of a peak under which an owner is too thin to see, and not named."""


def draw_curves(path: Path, curves: Sequence[Curve], best: Prediction, *, title: str) -> None:
    """Write FILE.svg, .png or .html."""
    save(figure_of(curves, best, title=title), path, title)


def figure_of(curves: Sequence[Curve], best: Prediction, *, title: str) -> Figure:
    """A panel for each curve, the recipe's own prediction marked in all."""
    rows = ceil(len(curves) / 2)
    figure = Figure(figsize=(11, 0.9 + 3.9 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, curve in zip(panels, curves, strict=False):
        _draw(axes, curve, best)
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    ledgers = [prediction.ledger for curve in curves for _, prediction in curve.points]
    drawn = [line for line in LEDGER_LINES if any(getattr(each, line) > _SEEN * each.total for each in ledgers)]
    handles = [Patch(color=COLOURS[line], label=line) for line in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw(axes: Axes, curve: Curve, best: Prediction) -> None:
    """Stacked areas in the ledger's order, above them what the peak may turn out to be, the budget as a line."""
    values = [value for value, _ in curve.points]
    predictions = [prediction for _, prediction in curve.points]
    heights = [[getattr(each.ledger, line) / GIB for each in predictions] for line in LEDGER_LINES]
    axes.stackplot(values, heights, colors=[COLOURS[line] for line in LEDGER_LINES], linewidth=0)
    peaks = [each.peak.highest_bytes / GIB for each in predictions]
    bounds = [upper_bound(each) / GIB for each in predictions]
    axes.fill_between(values, peaks, bounds, color="0.87", linewidth=0)
    axes.plot(values, peaks, color="black", linewidth=1)
    budget = best.budget_bytes / GIB
    axes.axhline(budget, color="black", linestyle="--", linewidth=1)
    axes.plot([curve.now], [best.peak.highest_bytes / GIB], marker="o", color="black", markersize=6, clip_on=False)
    axes.set_xscale("log", base=2)
    axes.set_xlim(values[0], values[-1])
    needed = max(budget, best.peak.highest_bytes / GIB)
    axes.set_ylim(0, 1.1 * max(needed, min(max(peaks), SHOWN * needed)))
    ticks = _ticks(values)
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value):,}"))
    axes.set_xlabel(curve.name)
    axes.set_ylabel("GiB on each GPU" if best.peak.device_bytes is not None else "GiB")
    axes.set_title(_words(curve, best), loc="left", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _words(curve: Curve, best: Prediction) -> str:
    budget = format_bytes(best.budget_bytes)
    if not curve.fitting:
        return f"none is sure to fit {budget} (dashed)"
    least, most = curve.fitting[0], curve.fitting[-1]
    if len(curve.fitting) == len(curve.points):
        return f"all fit {budget} (dashed)"
    return f"{f'up to {most:,}' if least == curve.points[0][0] else f'{least:,} and more'} fit {budget} (dashed)"


def _ticks(values: Sequence[int]) -> list[int]:
    """Powers of two times the first, at most eight of them."""
    doublings = 1
    while values[0] * 2 ** (8 * doublings) <= values[-1]:
        doublings += 1
    ticks = [values[0]]
    while ticks[-1] * 2**doublings <= values[-1]:
        ticks.append(ticks[-1] * 2**doublings)
    return ticks
