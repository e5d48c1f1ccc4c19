"""A plan, printed: what fits best, what does not and why, and what to type next."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rich.table import Table

from brim.cli import console, costs
from brim.planning.ways_out import stepped
from brim.recipe import Recipe
from brim.report import Plan, Prediction
from brim.speed.cost import Cost
from brim.units import format_bytes, format_count

_LOSERS_SHOWN = 4


def show(result: Plan, start: Recipe, save: Path | None, taken: Sequence[Cost]) -> None:
    """`start`: what `brim tune` would do of itself. `taken`: hours and price of the first recipes, where a number of
    tokens was given."""
    console.out.print(
        f"{result.model} on {result.device_name} within {format_bytes(result.budget_bytes)}: "
        f"{result.num_fitting:,} of {result.num_searched:,} recipes fit; {result.goal} first",
        markup=False,
        soft_wrap=True,
    )
    shown = _shown(result)
    console.out.print(_table(shown))
    letters = _letters(shown)
    if len(letters) > 1:
        console.out.print("; ".join(f"{letter}: {place}" for place, letter in letters.items()), soft_wrap=True)
    for line in (*_costs(taken), *_reasons(shown), *_remarks(result)):
        console.out.print(line, markup=False, soft_wrap=True)
    recipe = str(save) if save is not None else f"{start.model} {_settings_of(result.recipes[0], start)}"
    on_gpu = " --device cuda" if result.recipes[0].peak.device_bytes is not None else ""
    console.out.print(f"Next: brim tune {recipe}{on_gpu}", markup=False, soft_wrap=True)


def _shown(result: Plan) -> dict[int, Prediction]:
    """By rank: what was rehearsed, the best two of the rest that fit, and the first losers of different kinds."""
    ranked = dict(enumerate(result.recipes, start=1))
    finalists = [rank for rank, p in ranked.items() if p.fits and p.method == "rehearsal"]
    estimated = [rank for rank, p in ranked.items() if p.fits and p.method != "rehearsal"]
    losers: dict[tuple[Any, ...], int] = {}
    for rank, prediction in ranked.items():
        if not prediction.fits:
            losers.setdefault((_place(prediction), prediction.recipe["method"], _formats(prediction.recipe)), rank)
    chosen = [*finalists, *estimated[:2], *list(losers.values())[:_LOSERS_SHOWN]]
    return {rank: ranked[rank] for rank in chosen}


def _table(shown: dict[int, Prediction]) -> Table:
    table = Table(box=None, pad_edge=False)
    letters = _letters(shown)
    titles = ["#", "method", "precision", "rows", "ckpt", "loss", "peak", "tokens/s", "fits"]
    for title in titles if len(letters) == 1 else ["#", "on", *titles[1:]]:
        numeric = title in ("#", "peak", "tokens/s")
        table.add_column(title, justify="right" if numeric else "left", no_wrap=title != "precision")
    for rank, prediction in shown.items():
        on = [letters[_place(prediction)]] if len(letters) > 1 else []
        table.add_row(str(rank), *on, *_cells(prediction))
    return table


def _letters(shown: dict[int, Prediction]) -> dict[str, str]:
    """Of each place that is shown, in the order in which they come."""
    return dict(zip(dict.fromkeys(map(_place, shown.values())), ascii_uppercase, strict=False))


def _place(prediction: Prediction) -> str:
    parallel = prediction.recipe["parallel"]
    count = parallel["nodes"] * parallel["devices_per_node"]
    return f"{count} x {prediction.device_name}" if count > 1 else prediction.device_name


def _cells(prediction: Prediction) -> tuple[str, ...]:
    recipe = prediction.recipe
    memory = recipe["memory"]
    rehearsed = prediction.method == "rehearsal"
    return (
        recipe["method"],
        _formats(recipe) + stepped(recipe) + _divided(recipe),
        f"{recipe['micro_batch_size']} x {recipe['grad_accumulation']}",
        memory["activation_checkpointing"],
        memory["loss"],
        ("" if rehearsed else "~") + format_bytes(prediction.peak.highest_bytes),
        format_count(float(f"{prediction.tokens_per_s:.2g}")),
        ("yes" if rehearsed else "likely") if prediction.fits else "no",
    )


def _divided(recipe: Mapping[str, Any]) -> str:
    """What several devices share."""
    parallel = recipe["parallel"]
    tensor = f", tensor {parallel['tensor']}" if parallel["tensor"] > 1 else ""
    return ("" if parallel["sharding"] == "none" else f", {parallel['sharding']}") + tensor


def _formats(recipe: Mapping[str, Any]) -> str:
    """`bf16`, `fp32/bf16` (weights, and what matmuls run in), `bf16 + fp32` (with a master copy)."""
    precision = recipe["precision"]
    weights, compute, master = precision["weights"], precision["compute"], precision["master"]
    text = weights if weights == compute else f"{weights}/{compute}"
    return text if master in ("none", weights) else f"{text} + {master}"


def _costs(taken: Sequence[Cost]) -> Iterator[str]:
    for rank, cost in enumerate(taken, start=1):
        yield f"#{rank} {costs.line(cost)}"


def _reasons(shown: dict[int, Prediction]) -> Iterator[str]:
    """Why each that is shown does not fit."""
    for rank, prediction in shown.items():
        if not prediction.fits:
            yield f"#{rank} {prediction.reasons[-1]}"


def _remarks(result: Plan) -> Iterator[str]:
    """What is not in the table: how many were compared, what was filled in and why, what to know of the best."""
    milliseconds = 1000 * result.search_s
    yield (
        f"{result.num_searched:,} recipes searched in {milliseconds:,.0f} ms; more of them in --json. "
        "rows: micro-batch x accumulation; ~: by closed form, not rehearsed; tokens/s: an upper estimate"
    )
    for key, why in result.derived.items():
        yield f"{key} = {why}"
    for reason in result.recipes[0].reasons:
        yield f"Note on #1: {reason}"


def _settings_of(prediction: Prediction, start: Recipe) -> str:
    """`--set key=value`, as a shell reads it, for each key in which the recipe differs from the start."""
    recipe = replace(Recipe.from_dict(prediction.recipe), model=start.model)  # as it was typed
    start = start.with_values({"optimizer.rounding": recipe.best_rounding})
    return " ".join(f"--set {shlex.quote(setting)}" for setting in recipe.settings(start))
