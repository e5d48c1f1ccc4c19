"""What `brim tune` says of its data: a line before every start; `--show-data`: rows coloured by what is learned."""

from typing import TYPE_CHECKING

from rich.text import Text

from brim import units
from brim.cli import console
from brim.recipe import Recipe
from brim.report import SCHEMA, Prediction

if TYPE_CHECKING:
    from brim.training.dataset import DataSet
    from brim.training.shown import Piece, ShownRow

_ROWS = 3
_LEARNED, _READ = "bold green", "dim"


def data_line(data: "DataSet", recipe: Recipe) -> str:
    """Rows, tokens, how many of them are learned, the longest example, and what becomes of those that are longer."""
    counts, length = data.counts, recipe.seq_len
    assert counts is not None
    told = [
        f"data: {units.format_count(counts.examples)} examples",
        f"{units.format_count(counts.tokens)} tokens in {units.format_count(len(data))} rows of {length}",
        f"{units.format_count(counts.learned)} trained",
        f"longest {units.format_count(counts.longest)}",
    ]
    share = f"{100 * counts.cut / counts.examples:.3g} %"
    if counts.cut and recipe.task in ("seq2seq-lm", "sequence-classification"):
        told.append(f"{share} longer than a row, the rest of them not read")
    elif counts.cut:
        told.append(f"{share} longer than a row and cut into several")
    return ", ".join(told)


def time_line(data: "DataSet", recipe: Recipe, predicted: Prediction, *, steps_done: int) -> str:
    """Steps of the run, and how long those that are left will take."""
    steps = data.steps(recipe)
    left = max(0, steps - steps_done)
    about = f"about {units.format_duration(left * predicted.step_time_s)}"
    if predicted.step_time_range_s is not None:
        low, high = predicted.step_time_range_s
        span = f"{units.format_duration(left * low)} to {units.format_duration(left * high)}"
        about = f"{about} ({span})" if low <= predicted.step_time_s <= high else span
    resumed = f", {steps_done} of them done" if steps_done else ""
    return f"run: {steps} steps of {recipe.rows_per_step} rows{resumed}, {about}"


def show_data(data: "DataSet", tokenizer: object, recipe: Recipe, *, json: bool) -> None:
    """The rows of the first examples on stdout, and the data's line."""
    from brim.training.shown import shown_rows

    rows = shown_rows(data, tokenizer, recipe, _ROWS)
    if json:
        assert data.counts is not None
        console.print_json(
            {
                "schema": SCHEMA,
                "model": recipe.model,
                "recipe": recipe.to_dict(),
                "counts": {**data.counts.to_dict(), "rows": len(data), "steps": data.steps(recipe)},
                "rows": [row.to_dict() for row in rows],
            }
        )
        return
    for number, row in enumerate(rows, 1):
        console.out.print(_title(number, row, data), style="bold", markup=False)
        console.out.print(_coloured(row) if console.out.is_terminal and not console.out.no_color else _marked(row))
    console.out.print(data_line(data, recipe), markup=False)


def _title(number: int, row: "ShownRow", data: "DataSet") -> str:
    places = f": {'; '.join(row.places)}" if row.places else ""
    filled = f", filled up with {row.padding}" if row.padding else ""
    tokens = sum(piece.tokens for piece in row.pieces)
    learned = sum(piece.tokens for piece in row.pieces if piece.learned)
    return f"row {number} of {len(data)}{places} ({tokens} tokens, {learned} trained{filled})"


def _coloured(row: "ShownRow") -> Text:
    shown = Text()
    for piece in row.pieces:
        shown.append(_before(piece) + piece.text + _after(piece), style=_LEARNED if piece.learned else _READ)
    return shown


def _marked(row: "ShownRow") -> Text:
    """As wdiff marks what is new: {+so+}."""
    texts = [f"{_before(p)}{{+{p.text}+}}{_after(p)}" if p.learned else p.text + _after(p) for p in row.pieces]
    return Text("".join(texts))


def _before(piece: "Piece") -> str:
    """An answer that the model does not read stands apart from what it reads."""
    return "\n-> " if piece.seen == "" else ""


def _after(piece: "Piece") -> str:
    return f"[read as {piece.seen}]" if piece.seen else ""
