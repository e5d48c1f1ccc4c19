"""Growth as a picture: each model a dot, with the fitted lines. Needs matplotlib (`pip install 'brim[plot]'`)."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from brim.growth.fit import CONFIDENCE, Growth
from brim.growth.trends import Trend
from brim.memory.picture import save

_ROOM_BELOW = 20
"""Factor under the least value: where the legend covers no dot."""

# Okabe and Ito's palette, as in memory/picture.py
_DOTS, _OVERALL, _SINCE = "#56B4E9", "#999999", "#D55E00"


def draw_trends(path: Path, trends: Sequence[Trend], *, since: int) -> None:
    """Write FILE.svg, .png or .html: one panel per quantity on a logarithmic axis."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flatten()
    for axes, trend in zip(panels, trends, strict=True):
        _draw(axes, trend, since)
    title = f"Released language models; lines: least squares of logarithms ({CONFIDENCE:.0%} intervals)"
    figure.suptitle(title)
    save(figure, path, title)


def _draw(axes: Axes, trend: Trend, since: int) -> None:
    dates, values = zip(*trend.points, strict=True)
    axes.scatter(dates, values, s=14, color=_DOTS)
    for fit, colour, name, start in (
        (trend.overall, _OVERALL, "all years", min(dates)),
        (trend.since, _SINCE, f"since {since}", since),
    ):
        if fit is not None:
            span = [start, max(dates)]
            axes.plot(span, [fit.at(date) for date in span], color=colour, label=f"{name}: {_words(fit)}")
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(values) / _ROOM_BELOW)
    axes.set_title(trend.title + (" (FLOP)" if trend.quantity == "flops" else ""), loc="left")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _words(fit: Growth) -> str:
    return f"x{fit.factor:.2g} a year ({fit.factor_low:.2g} to {fit.factor_high:.2g})"
