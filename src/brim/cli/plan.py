"""`brim plan`: ranked recipes that fit a memory budget."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from brim.cli import console, limits, options
from brim.cli.answered import rehearsed
from brim.hardware import Device
from brim.memory.bands import DEFAULT_RISK
from brim.models import describe
from brim.planning import Constraints, NothingFitsError, plan
from brim.planning.ranking import Goal, kind_of
from brim.publish import write_whole
from brim.recipe import Recipe
from brim.report import Plan, Prediction
from brim.units import format_bytes, format_count, parse_bytes

_LOSERS_SHOWN = 4

Save = Annotated[Path | None, typer.Option(help="Write the best recipe to this TOML file.", show_default=False)]
Quick = Annotated[bool, typer.Option("--quick", help="Closed form alone, no torch: in a moment, less sure.")]
Reach = Annotated[
    bool, typer.Option("--limits", help="Also the longest row, the largest batch and the smallest hardware.")
]


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Catalogue name, directory, Hub id or .gguf file.")],
    device: Annotated[str, typer.Option(help="cpu, or cuda for the GPU of this machine.")] = "cpu",
    gpu: options.GpuName = None,
    risk: options.Risk = DEFAULT_RISK,
    memory: Annotated[
        str | None, typer.Option(help="Budget, as 2GiB. Default: what is free now.", show_default=False)
    ] = None,
    method: Annotated[
        Literal["auto", "full", "lora", "qlora", "qat"], typer.Option(help="auto compares all but qat.")
    ] = "auto",
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row. Default: 1024 or fewer.", show_default=False)
    ] = None,
    global_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of an optimizer step. Default: one micro-batch.", show_default=False),
    ] = None,
    goal: Annotated[Goal, typer.Option(help="What the best recipe is best at.")] = "fastest",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Pin any recipe key; may be repeated.", show_default=False),
    ] = None,
    save: Save = None,
    gpus: options.Gpus = 1,
    nodes: options.Nodes = 1,
    quick: Quick = False,
    reach: Reach = False,
    anew: options.Anew = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rank the recipes that fit a memory budget, and say why the others do not."""
    constraints = Constraints(
        method=method,
        seq_len=seq_len,
        global_batch_size=global_batch_size,
        devices_per_node=gpus or 1,
        nodes=nodes or 1,
        settings=tuple(settings or ()),
    )
    cap = parse_bytes(memory) if memory is not None else None
    try:
        found = options.device_of(device, gpu, cap, quick=quick)
        result = _search(model, found, _budget(found, cap, constraints), risk, constraints, goal, anew, quick)
    except NothingFitsError as error:
        if json:
            console.print_json(error.plan.to_dict())
        elif reach:
            limits.show(limits.of(describe(model), found, constraints, _budget(found, cap, constraints)), found)
        raise
    if save is not None:
        write_whole(save, _recipe(result.recipes[0]).to_toml())
    reached = limits.of(describe(model), found, constraints, result.budget_bytes) if reach else None
    if json:
        console.print_json(result.to_dict() | ({} if reached is None else {"limits": reached.to_dict()}))
        return
    _print(result, model, save)
    if reached is not None:
        limits.show(reached, found)


def _budget(device: Device, cap: int | None, constraints: Constraints) -> int:
    """Of each device; a processor's is shared by its processes."""
    budget = options.budget_of(device, cap)
    return budget // constraints.devices_per_node if device.kind == "cpu" else budget


def _search(
    model: str,
    device: Device,
    budget: int,
    risk: float,
    constraints: Constraints,
    goal: Goal,
    anew: bool,
    quick: bool,
) -> Plan:
    spec = describe(model)
    if device.memory_free_bytes < budget:
        console.note(f"only {format_bytes(device.memory_free_bytes)} are free now, less than the budget")
    if quick:
        return plan(spec, device, budget_bytes=budget, rehearse=None, constraints=constraints, goal=goal)
    with console.progress(f"Rehearsing finalists for {spec.name}") as progress:
        return plan(
            spec,
            device,
            budget_bytes=budget,
            rehearse=lambda recipe: rehearsed(spec, recipe, device, budget, risk, anew=anew),
            constraints=constraints,
            goal=goal,
            risk=risk,
            progress=progress,
        )


def _print(result: Plan, model: str, save: Path | None) -> None:
    fitting = sum(p.fits for p in result.recipes)
    console.out.print(
        f"{result.model} on {result.device_name} within {format_bytes(result.budget_bytes)}: "
        f"{fitting} of {len(result.recipes)} recipes fit; {result.goal} first",
        markup=False,
    )
    shown = _shown(result)
    console.out.print(_table(shown))
    for line in (*_reasons(shown), *_remarks(result, len(shown))):
        console.out.print(line, markup=False, soft_wrap=True)
    recipe = str(save) if save is not None else f"{model} {_settings_of(result.recipes[0])}"
    console.out.print(f"Next: brim tune {recipe}", markup=False, soft_wrap=True)


def _shown(result: Plan) -> dict[int, Prediction]:
    """By rank: what was rehearsed, the best two of the rest that fit, and the first losers of different kinds."""
    ranked = dict(enumerate(result.recipes, start=1))
    finalists = [rank for rank, p in ranked.items() if p.fits and p.method == "rehearsal"]
    estimated = [rank for rank, p in ranked.items() if p.fits and p.method != "rehearsal"]
    losers: dict[tuple[Any, ...], int] = {}
    for rank, prediction in ranked.items():
        if not prediction.fits:
            losers.setdefault(kind_of(prediction), rank)
    chosen = [*finalists, *estimated[:2], *list(losers.values())[:_LOSERS_SHOWN]]
    return {rank: ranked[rank] for rank in chosen}


def _table(shown: dict[int, Prediction]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("#", "method", "precision", "rows", "ckpt", "loss", "peak", "tokens/s", "fits"):
        numeric = title in ("#", "peak", "tokens/s")
        table.add_column(title, justify="right" if numeric else "left", no_wrap=True)
    for rank, prediction in shown.items():
        table.add_row(str(rank), *_cells(prediction))
    return table


def _cells(prediction: Prediction) -> tuple[str, ...]:
    recipe = prediction.recipe
    precision, memory = recipe["precision"], recipe["memory"]
    rehearsed = prediction.method == "rehearsal"
    return (
        recipe["method"],
        _formats(precision)
        + (", 8-bit" if recipe["optimizer"]["name"] == "adamw8bit" else "")
        + {"none": "", "optimizer": ", offload"}.get(memory["offload"], f", offload {memory['offload']}"),
        f"{recipe['micro_batch_size']} x {recipe['grad_accumulation']}",
        memory["activation_checkpointing"],
        memory["loss"],
        ("" if rehearsed else "~") + format_bytes(prediction.peak.highest_bytes),
        format_count(float(f"{prediction.tokens_per_s:.2g}")),
        ("yes" if rehearsed else "likely") if prediction.fits else "no",
    )


def _divided(recipe: Mapping[str, Any]) -> str:
    """What several devices share."""
    sharding = recipe["parallel"]["sharding"]
    return "" if sharding == "none" else f", {sharding}"


def _formats(precision: dict[str, str]) -> str:
    """`bf16`, `fp32/bf16` (weights, and what matmuls run in), `bf16 + fp32` (with a master copy)."""
    weights, compute, master = precision["weights"], precision["compute"], precision["master"]
    text = weights if weights == compute else f"{weights}/{compute}"
    return text if master in ("none", weights) else f"{text} + {master}"


def _reasons(shown: dict[int, Prediction]) -> Iterator[str]:
    """Why each that is shown does not fit."""
    for rank, prediction in shown.items():
        if not prediction.fits:
            yield f"#{rank} {prediction.reasons[-1]}"


def _remarks(result: Plan, num_shown: int) -> Iterator[str]:
    """What is not in the table: how many more, what was filled in and why, what to know of the best."""
    rest = len(result.recipes) - num_shown
    yield (
        f"{rest} more in --json. rows: micro-batch x accumulation; ~: by closed form, not rehearsed; "
        "tokens/s: an upper estimate"
    )
    for key, why in result.derived.items():
        yield f"{key} = {why}"
    for reason in result.recipes[0].reasons:
        yield f"Note on #1: {reason}"


def _recipe(prediction: Prediction) -> Recipe:
    return Recipe.from_dict(prediction.recipe)


def _settings_of(prediction: Prediction) -> str:
    """`--set key=value` for each key in which the recipe differs from the defaults."""
    recipe = _recipe(prediction)
    chosen, default = recipe.to_dict(), Recipe(model=recipe.model).to_dict()
    return " ".join(f"--set {key}={value}" for key, value in _differences(chosen, default, ""))


def _differences(chosen: dict[str, Any], default: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in chosen.items():
        if isinstance(value, dict):
            yield from _differences(value, default[key], f"{prefix}{key}.")
        elif value != default[key]:
            yield prefix + key, value
