"""`brim evaluate MODEL`: perplexity over a text, beside a baseline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from brim import units
from brim.cli import console, options
from brim.report import SCHEMA

if TYPE_CHECKING:
    from brim.inference import Perplexity

OWN_TEXT = "WikiText-2 excerpt (ships with brim)"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, Hub id or local directory.")],
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text; default: an excerpt of ours.")] = None,
    baseline: Annotated[str | None, typer.Option(metavar="MODEL", help="Model to compare with.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Most tokens seen at once; it moves by half of that.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Read only the text's first tokens.")] = None,
    format: options.PackedFormat = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Perplexity over a text, beside a baseline."""
    from brim.inference import held_text, read_text

    text = read_text(data) if data else held_text()
    found = _measure(model, text, window=window, max_tokens=max_tokens, format=format)
    beside = _measure(baseline, text, window=window, max_tokens=max_tokens) if baseline else None
    source = str(data) if data else OWN_TEXT
    if json:
        console.print_json(_to_dict(model, found, baseline, beside, source))
        return
    console.out.print(_table(model, found, baseline, beside))
    console.out.print(
        f"{found.num_tokens} tokens of {source}, window {found.window}, stride {found.stride}; lower is better",
        markup=False,
    )


def _measure(model: str, text: str, *, window: int, max_tokens: int | None, format: str | None = None) -> "Perplexity":
    from brim.inference import load, locate, perplexity

    with console.progress(f"preparing {model}") as listen:
        directory = locate(model, progress=listen)
    loaded = load(directory, pack=format)
    with console.progress(f"perplexity of {model}") as listen:
        return perplexity(loaded, text, window=window, stride=window // 2, max_tokens=max_tokens, progress=listen)


def _change(found: "Perplexity", beside: "Perplexity") -> float:
    return found.value / beside.value - 1


def _to_dict(
    model: str, found: "Perplexity", baseline: str | None, beside: "Perplexity | None", source: str
) -> dict[str, Any]:
    result = {"schema": SCHEMA, "model": model, "data": source, **found.to_dict(), "baseline": None}
    if beside:
        result["baseline"] = {"model": baseline, **beside.to_dict()}
        result["relative_change"] = _change(found, beside)
    return result


def _table(model: str, found: "Perplexity", baseline: str | None, beside: "Perplexity | None") -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("model", "perplexity", "change", "time"):
        table.add_column(title, justify="left" if title == "model" else "right")
    if baseline and beside:
        table.add_row(f"{baseline} (baseline)", f"{beside.value:.4f}", "", units.format_duration(beside.seconds))
    change = f"{_change(found, beside):+.2%}" if beside else ""
    table.add_row(model, f"{found.value:.4f}", change, units.format_duration(found.seconds))
    return table
