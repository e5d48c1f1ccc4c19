"""`brim doctor`: this machine, and what it was measured to achieve; `--gpu NAME`: what is known of another device."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from brim.cli import console
from brim.cli.options import Json
from brim.errors import UsageError
from brim.hardware.catalogue import Accelerator, accelerator
from brim.report import SCHEMA
from brim.units import format_bytes

if TYPE_CHECKING:
    from brim.hardware.checkup import Checkup
    from brim.hardware.rates import Rates


def command(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Time a step's operators on this processor, and keep the rates.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the catalogue knows of this device.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Devices, memory free now, disk, libraries; what this machine achieves."""
    if gpu is not None:
        if calibrate:
            raise UsageError(f"--calibrate times this machine and --gpu {gpu} asks of another; give one of them")
        _show_row(accelerator(gpu), json=json)
        return
    from brim.hardware.checkup import check_up, rates_to_dict

    measured = _calibrated() if calibrate else None
    found = check_up()
    if json:
        rates = found.rates if measured is None else rates_to_dict(measured)
        console.print_json({"schema": SCHEMA, **found.to_dict(), "rates": rates})
        return
    _show(found)
    if measured is not None:
        _show_rates(measured)
    elif not found.calibrated:
        console.note("not calibrated: brim doctor --calibrate takes some seconds, and step times become predictions")


def _calibrated() -> "Rates":
    from brim.hardware.measure import calibrate
    from brim.hardware.rates import cache_path

    console.note("timing products, attention and passes on this processor ...")
    rates, kept = calibrate()
    if kept:
        console.note(f"kept in {cache_path()}")
    else:
        console.note("not kept: others use the processors now, so the rates are too low; run it again when it is quiet")
    return rates


def _show(found: "Checkup") -> None:
    from brim.hardware.checkup import OPTIONAL

    _say(f"{found.system}, Python {found.python}{'; busy now' if found.busy else ''}")
    table = _table("device", "memory", "free now", "")
    for device in found.devices:
        free = "not known" if device.memory_free_bytes is None else format_bytes(device.memory_free_bytes)
        table.add_row(f"{device.kind}: {device.name}", format_bytes(device.memory_bytes), free, device.detail)
    console.out.print(table)
    if found.no_gpu_because:
        _say(f"no GPU: {found.no_gpu_because}")
    if found.memory_limits_bytes:
        _say(f"container limits: {', '.join(map(format_bytes, found.memory_limits_bytes))}")
    for disk in found.disks:
        _say(f"disk, {disk.purpose}: {format_bytes(disk.free_bytes)} free of {format_bytes(disk.total_bytes)}")
    _say(", ".join(f"{name} {version}" for name, version in found.libraries.items() if version is not None))
    for name, version in found.libraries.items():
        if version is None:
            _say(f"not installed: {name} ({OPTIONAL.get(name, f'pip install {name}')})")
    if found.rates is not None:
        flops = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in found.rates["flops"].items())
        _say(f"measured before: products {flops}; copies {found.rates['bandwidth_bytes_per_s'] / 1e9:,.1f} GB/s")


def _show_rates(rates: "Rates") -> None:
    assert rates.operators is not None
    table = _table("measured", "rate")
    for name, rate in rates.operators.rates.items():
        unit = "GB/s" if name.startswith(("fresh", "in-place", "function", "reduce")) else "GFLOP/s"
        table.add_row(name, f"{rate / 1e9:,.1f} {unit}")
    table.add_row("dispatch of an operator", f"{1e6 * rates.operators.overhead_s:.1f} us")
    console.out.print(table)


def _show_row(row: Accelerator, *, json: bool) -> None:
    facts: dict[str, Any] = {**asdict(row), "peak_flops": dict(row.peak_flops)}
    if json:
        console.print_json({"schema": SCHEMA, "accelerator": facts})
        return
    table = _table(row.name, "")
    table.add_row("memory", format_bytes(row.memory_bytes))
    table.add_row("bandwidth", f"{row.bandwidth_bytes_per_s / 1e9:,.0f} GB/s")
    for name, rate in row.peak_flops.items():
        table.add_row(f"{name}, dense, by its maker", f"{rate / 1e12:,.5g} TFLOP/s")
    if row.measured_bf16_flops is not None:
        table.add_row("bf16, measured", f"{row.measured_bf16_flops / 1e12:,.5g} TFLOP/s")
    if row.link_bytes_per_s is not None:
        table.add_row(f"link ({row.link})", f"{row.link_bytes_per_s / 1e9:,.0f} GB/s one way")
    if row.power_w is not None:
        table.add_row("power limit", f"{row.power_w:,.0f} W")
    if row.price_usd_per_hour is not None:
        table.add_row("rented, seen once", f"${row.price_usd_per_hour:g} an hour")
    console.out.print(table)
    _say(f"names: {', '.join(row.aliases)}")
    _say(f"source: {row.source}")


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number in (0, 3) else "right", overflow="fold")
    return table


def _say(text: str) -> None:
    console.out.print(text, markup=False, soft_wrap=True)
