"""`--plot FILE`: checked before the work starts, drawn after it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brim.errors import MissingPartError, UsageError
from brim.report import Ledger

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from brim.memory.trace import Trace

_SUFFIXES = (".svg", ".png", ".html")

Plot = Annotated[
    Path | None,
    typer.Option(help="Write the ledger as a picture: FILE.svg, FILE.png or FILE.html.", show_default=False),
]


def check(path: Path | None) -> None:
    """Raises UsageError for a file that cannot be drawn, MissingPartError without what draws it."""
    if path is None:
        return
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"--plot {path}: pictures are {' or '.join(_SUFFIXES)}; give the file one of these endings")
    try:
        import matplotlib  # noqa: F401 - asked for its presence
    except ImportError:
        raise MissingPartError("--plot needs matplotlib; run: pip install 'brim[plot]'") from None


def draw(
    path: Path | None,
    *,
    title: str,
    bars: Mapping[str, Ledger],
    budget_bytes: int | None = None,
    trace: "Trace | None" = None,
    below: "Sequence[Callable[[Axes], None]]" = (),
) -> None:
    """One bar per ledger, memory over time where there is a trace, other panels below; the file appears whole."""
    if path is None:
        return
    from brim.memory.picture import draw_ledgers

    with whole(path) as partial:
        draw_ledgers(partial, title=title, bars=bars, budget_bytes=budget_bytes, trace=trace, below=below)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another path to draw to, which becomes `path` when the drawing is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
