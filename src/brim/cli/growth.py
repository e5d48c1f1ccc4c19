"""`brim growth`: how models grew, and what training one from scratch would take."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from brim.cli import console, picture
from brim.cli.options import Json
from brim.errors import UsageError
from brim.growth import Feasibility, Trend, feasibility, trends
from brim.growth.feasibility import Span
from brim.growth.fit import CONFIDENCE, Growth
from brim.growth.history import releases, utilizations
from brim.growth.trends import TURN
from brim.hardware.catalogue import accelerator
from brim.report import SCHEMA
from brim.units import format_bytes, format_count, parse_count

_DEFAULT_GPU = "h100"
_LATEST_START = 2025
_HOURS_PER_YEAR = 24 * 365.25


def command(
    params: Annotated[
        str | None, typer.Option(help="Train a model of this many parameters: 100B.", show_default=False)
    ] = None,
    active_params: Annotated[
        str | None, typer.Option(help="Of these, as many as one token meets (experts): 5B.", show_default=False)
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="On this many tokens: 2T. Default: compute-optimal.", show_default=False)
    ] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="On this GPU. Default: h100.")] = None,
    gpus: Annotated[int, typer.Option(min=1, max=10**7, help="As many of them.")] = 1,
    price: Annotated[
        float | None, typer.Option(min=0.001, help="USD for an hour of one GPU. Default: the catalogue's.")
    ] = None,
    since: Annotated[int, typer.Option(min=2018, max=_LATEST_START, help="Fit the years from here on, too.")] = TURN,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the history: FILE.svg, FILE.png or FILE.html.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """How model sizes, data and compute grew; with --params, what training such a model would take."""
    picture.check(plot)
    if params is None and any(value is not None for value in (active_params, tokens, gpu, price)):
        raise UsageError("--active-params, --tokens, --gpu and --price say how to train a model; give --params, too")
    history = trends(since)
    answer = None if params is None else _feasibility(params, active_params, tokens, gpu or _DEFAULT_GPU, gpus, price)
    if plot is not None:
        from brim.growth.picture import draw_trends

        with picture.whole(plot) as partial:
            draw_trends(partial, history, since=since)
    if json:
        grown = {"since": since, "confidence": CONFIDENCE, "trends": [trend.to_dict() for trend in history]}
        extra = {} if answer is None else {"feasibility": answer.to_dict(), "sentence": _sentence(answer)}
        console.print_json({"schema": SCHEMA, **grown, **extra})
    elif answer is None:
        _print_history(history, since)
    else:
        _print_feasibility(answer)


def _feasibility(
    params: str, active_params: str | None, tokens: str | None, gpu: str, gpus: int, price: float | None
) -> Feasibility:
    return feasibility(
        parse_count(params, what="--params"),
        accelerator(gpu),
        active_parameters=None if active_params is None else parse_count(active_params, what="--active-params"),
        tokens=None if tokens is None else parse_count(tokens, what="--tokens"),
        num_gpus=gpus,
        price_per_hour_usd=price,
    )


def _print_history(history: list[Trend], since: int) -> None:
    models = releases()
    first, last = int(models[0].date), int(models[-1].date)
    _say(f"{len(models)} released language models, {first} to {last}: factor a year ({CONFIDENCE:.0%} interval)")
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in ("", "years", "models", "a year", f"{CONFIDENCE:.0%} interval", "doubles in months"):
        table.add_column(title, no_wrap=True, justify="left" if title in ("", "years") else "right")
    for trend in history:
        for years, fit in {"all": trend.overall, f"to {since}": trend.before, f"since {since}": trend.since}.items():
            table.add_row(trend.title if years == "all" else "", years, *_cells(fit))
    console.out.print(table)
    verdicts = "; ".join(f"{trend.title}: {trend.verdict}" for trend in history)
    _say(f"Since {since}. {verdicts}.")
    if all(trend.since is not None and not trend.since.is_growth for trend in history if "parameters" in trend.title):
        _say(f'"Ever larger" no longer holds: models of {since} and later differ in size, and grow in what they read.')
    _say(
        "A sample of known models (small members of families too), not all of them; "
        "--plot FILE.svg draws it, --params 100B says what training one would take."
    )


def _cells(fit: Growth | None) -> tuple[str, ...]:
    if fit is None:
        return "", "-", "", ""
    interval = f"{fit.factor_low:.2f} to {fit.factor_high:.2f}"
    return str(fit.num_points), f"x{fit.factor:.2f}", interval, _doubling(fit)


def _doubling(fit: Growth) -> str:
    if fit.doubling_months is None:
        return "never"
    fastest, slowest = fit.doubling_interval
    end = "never" if slowest is None else _months(slowest)
    return f"{_months(fit.doubling_months)} ({_months(fastest)} to {end})"


def _months(value: float | None) -> str:
    assert value is not None  # the fast end of what doubles
    return f"{value:.1f}" if value < 20 else f"{value:.0f}"


def _print_feasibility(answer: Feasibility) -> None:
    experts = answer.active_parameters < answer.num_parameters
    active = f" ({format_count(answer.active_parameters)} active)" if experts else ""
    _say(f"{format_count(answer.num_parameters)} parameters{active} on {answer.gpu}; 1 GB = 10^9 bytes")
    console.out.print(_weights(answer))
    memory = answer.gpu_memory_bytes
    _say(
        f"Training, rule of thumb (24 bytes a parameter): {_gigabytes(answer.rule_bytes)}, "
        f"{answer.small_cards:,.3g} times a 24 GB card; {answer.gpus_needed:,} {answer.gpu} of {format_bytes(memory)}"
    )
    _say(
        f"Training, mixed precision with AdamW (16 bytes a parameter, activations not counted): "
        f"{_gigabytes(answer.state_bytes)}; at least {answer.gpus_needed_for_states:,}"
    )
    if answer.num_gpus < answer.gpus_needed_for_states:
        _say(f"{answer.num_gpus:,} cannot hold it: the hours below suppose that they could")
    given = "" if answer.tokens_are_chosen else " (compute-optimal)"
    _say(
        f"Tokens: {format_count(answer.tokens)}{given}; compute-optimal {format_count(answer.optimal_tokens)} "
        f"({answer.optimal_tokens / answer.active_parameters:.0f} a parameter, replication of the Chinchilla fit; the "
        f"paper's rounded coefficients would say {format_count(answer.optimal_tokens_as_published)})"
    )
    shares = answer.utilization
    _say(
        f"Compute: {answer.flops:.3g} FLOP. Utilization: {shares.middle:.0%} ({shares.low:.0%} to {shares.high:.0%}, "
        f"quartiles of {len(utilizations())} runs with published GPU hours)"
    )
    _say(f"{answer.num_gpus:,} x {answer.gpu}: {_duration(answer.hours)}")
    if answer.price_usd is not None:
        _say(f"Price at ${answer.price_per_hour_usd:g} for an hour of one: ${_span(answer.price_usd)}")
    else:
        _say("Price: not known for this GPU; give --price")
    if answer.energy_kwh is not None:
        _say(f"Energy at the boards' power limit: {_span(answer.energy_kwh.times(1e-3))} MWh")
    _say(_sentence(answer))


def _weights(answer: Feasibility) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("format", no_wrap=True)
    table.add_column("weights", justify="right", no_wrap=True)
    table.add_column(f"GPUs of {format_bytes(answer.gpu_memory_bytes)}", justify="right", no_wrap=True)
    for name, nbytes in answer.weight_bytes.items():
        table.add_row(name, _gigabytes(nbytes), f"{-(-nbytes // answer.gpu_memory_bytes):,}")
    return table


def _sentence(answer: Feasibility) -> str:
    """What one device could do: from scratch, and instead."""
    verb = "fit" if answer.lora_fits_one_gpu else "do not fit"
    return (
        f"On one {answer.gpu}, training it from scratch: {_duration(answer.one_gpu_hours)}, if memory were no limit; "
        f"fine-tuning it with LoRA over a 4-bit base on {format_count(answer.lora_tokens)} tokens: "
        f"{_duration(answer.lora_hours_one_gpu)}; base and adapters ({_gigabytes(answer.lora_bytes)} before "
        f"activations) {verb} its memory."
    )


def _duration(hours: Span) -> str:
    """The middle with its range, in the unit that the middle asks for."""
    for size, unit in ((_HOURS_PER_YEAR, "years"), (24, "days"), (1, "hours"), (1 / 60, "minutes")):
        if hours.middle >= 2 * size or unit == "minutes":
            return f"{_span(hours.times(1 / size))} {unit}"
    raise AssertionError


def _span(span: Span) -> str:
    return f"{_digits(span.middle)} ({_digits(span.low)} to {_digits(span.high)})"


def _digits(value: float) -> str:
    """Two significant digits: the range says that there are no more."""
    return f"{float(f'{value:.2g}'):,.12g}"


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 10**9:,.4g} GB" if nbytes < 10**13 else f"{nbytes / 10**9:,.0f} GB"


def _say(text: str) -> None:
    console.out.print(text, markup=False, soft_wrap=True)
