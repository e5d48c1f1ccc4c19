"""`brim plan`: ranked recipes that fit a memory budget."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from brim.cli import console, costs, curves, limits, options, picture, planned
from brim.cli.answered import rehearsed
from brim.cli.starting import uncollected
from brim.hardware.catalogue import lookup
from brim.memory.bands import DEFAULT_RISK
from brim.models import ModelSpec, describe
from brim.planning import Constraints, NothingFitsError, Offer, plan
from brim.planning.limits import Limits
from brim.planning.ranking import Goal
from brim.publish import write_whole
from brim.recipe import Recipe
from brim.report import Plan
from brim.speed.cost import Cost
from brim.units import format_bytes, parse_bytes, parse_count

Save = Annotated[Path | None, typer.Option(help="Write the best recipe to this TOML file.", show_default=False)]
Quick = Annotated[bool, typer.Option("--quick", help="Closed form alone, no torch: in a moment, less sure.")]
Reach = Annotated[
    bool, typer.Option("--limits", help="Also the longest row, the largest batch and model, the smallest hardware.")
]
GpuNames = Annotated[
    list[str] | None,
    typer.Option("--gpu", metavar="NAME", help="A GPU that need not be here, as a100; may be repeated, to compare."),
]
Format = Annotated[str | None, typer.Option("--format", help="Hold the base so: fp32, bf16, fp16, int8, int4 or nf4.")]

Budget = Annotated[str | None, typer.Option(help="Budget, as 2GiB. Default: what is free now.", show_default=False)]
Rows = Annotated[
    int | None,
    typer.Option(min=1, help="Rows of an optimizer step. Default: one micro-batch.", show_default=False),
]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens of a row. Default: 1024 or fewer.", show_default=False)]


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Catalogue name, directory, Hub id or .gguf file.")],
    device: Annotated[str, typer.Option(help="cpu, or cuda for the GPU of this machine.")] = "cpu",
    gpu: GpuNames = None,
    risk: options.Risk = DEFAULT_RISK,
    memory: Budget = None,
    method: Annotated[
        Literal["auto", "full", "lora", "qlora", "qat"], typer.Option(help="auto compares all but qat.")
    ] = "auto",
    weights: Format = None,
    seq_len: Length = None,
    global_batch_size: Rows = None,
    goal: Annotated[
        Goal, typer.Option(help="What the best recipe is best at; cheapest also looks at fewer of the GPUs.")
    ] = "fastest",
    tokens: options.Tokens = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Pin any recipe key; may be repeated.", show_default=False),
    ] = None,
    save: Save = None,
    gpus: options.Gpus = 1,
    nodes: options.Nodes = 1,
    tensor: options.Tensor = None,
    quick: Quick = False,
    reach: Reach = False,
    plot: curves.Plot = None,
    anew: options.Anew = False,
    json: options.Json = False,
) -> None:
    """Rank the recipes that fit a memory budget, and say why the others do not."""
    picture.check(plot)
    named = {"precision.weights": weights, "parallel.tensor": tensor}
    pinned = (*(f"{key}={value}" for key, value in named.items() if value is not None), *(settings or ()))
    constraints = Constraints(method=method, seq_len=seq_len, global_batch_size=global_batch_size, settings=pinned)
    num_tokens = None if tokens is None else parse_count(tokens, what="--tokens")
    spec, cap = describe(model), None if memory is None else parse_bytes(memory)
    offers = [_offer(device, name, cap, gpus or 1, nodes or 1, quick=quick) for name in gpu or (None,)]
    try:
        result = _search(spec, offers, risk, constraints, goal, anew=anew, quick=quick)
    except NothingFitsError as error:
        curves.draw(plot, spec, error.plan, offers, risk)
        if json:
            console.print_json(error.plan.to_dict())
        elif reach:
            limits.show(limits.of(spec, offers[0], constraints), offers[0].device)
        raise
    curves.draw(plot, spec, result, offers, risk)
    if save is not None:
        write_whole(save, Recipe.from_dict(result.recipes[0].recipe).to_toml())
    reached = limits.of(spec, offers[0], constraints) if reach else None
    taken = costs.of_best(spec, result, num_tokens, {offer.device.name: offer.device for offer in offers})
    if json:
        _print_json(result, taken, reached)
        return
    planned.show(result, options.default_recipe(spec, model), save, taken)
    if reached is not None:
        limits.show(reached, offers[0].device)


def _print_json(result: Plan, taken: Sequence[Cost], reached: Limits | None) -> None:
    costly = {"costs": [one.to_dict() for one in taken]} if taken else {}
    reach = {} if reached is None else {"limits": reached.to_dict()}
    console.print_json(result.to_dict() | {"search_s": result.search_s} | costly | reach)


def _offer(device: str, gpu: str | None, cap: int | None, gpus: int, nodes: int, *, quick: bool) -> Offer:
    """What was named; a processor's memory is shared by its processes."""
    found = options.device_of(device, gpu, cap, quick=quick)
    budget = options.budget_of(found, cap)
    row = lookup(found.name)
    return Offer(
        device=found,
        budget_bytes=budget // gpus if found.kind == "cpu" else budget,
        devices_per_node=gpus,
        nodes=nodes,
        price_usd_per_hour=row.price_usd_per_hour if row else None,
        power_w=row.power_w if row else None,
    )


def _search(
    spec: ModelSpec,
    offers: Sequence[Offer],
    risk: float,
    constraints: Constraints,
    goal: Goal,
    *,
    anew: bool,
    quick: bool,
) -> Plan:
    for offer in offers:
        if offer.device.memory_free_bytes < offer.budget_bytes:
            free = format_bytes(offer.device.memory_free_bytes)
            console.note(f"only {free} are free now, less than the budget")
    if quick:
        with uncollected():  # thousands of recipes are all kept, and looking through them took a twentieth of the time
            return plan(spec, offers, rehearse=None, constraints=constraints, goal=goal, risk=risk)
    with console.progress(f"Rehearsing finalists for {spec.name}") as progress:
        return plan(
            spec,
            offers,
            rehearse=lambda recipe, offer: rehearsed(spec, recipe, offer.device, offer.budget_bytes, risk, anew=anew),
            constraints=constraints,
            goal=goal,
            risk=risk,
            progress=progress,
        )
