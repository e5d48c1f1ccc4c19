"""`brim formats [NUMBER]`: number formats as rows, and what becomes of a number in each."""

import math
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import typer
from rich.table import Table

from brim.cli import console
from brim.cli.options import Json
from brim.errors import UsageError
from brim.numerics.formats import FORMATS, NumberFormat
from brim.numerics.represent import Representation, represent
from brim.report import SCHEMA

BILLION = 10**9


def command(
    number: Annotated[str | None, typer.Argument(metavar="NUMBER", help="As 3.14159265.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Bits, range, step; what becomes of NUMBER in each format."""
    value = None if number is None else _parse(number)
    if json:
        rows = [_to_dict(row, value) for row in FORMATS.values()]
        console.print_json({"schema": SCHEMA, "number": value, "formats": rows})
        return
    console.out.print(_formats_table())
    console.note("layout: bits of sign, exponent and fraction, or codes; scale: its format / elements that share it")
    if value is None:
        console.note("brim formats 3.14159265 shows what becomes of a number in each")
    else:
        console.out.print(_number_table(value))


def _parse(text: str) -> float:
    try:
        value, exact = float(text), Decimal(text)
    except (ValueError, InvalidOperation):
        raise UsageError(f"{text!r} is not a number; write for example 3.14159265 or 1e-5") from None
    if not exact.is_finite():
        raise UsageError(f"{text} is not a finite number; write for example 3.14159265 or 1e-5")
    if math.isinf(value) or bool(exact) != bool(value):
        raise UsageError(f"{text} is outside what 64 bits hold (5e-324 to 1.8e308); write for example 3.14159265")
    return value


def _representations(row: NumberFormat, number: float) -> dict[str, Representation]:
    """By how the scale was chosen; integers are also shown as they are without one, at scale 1."""
    if row.scale == "none":
        return {"": represent(row, number)}
    fitted = {"fitted": represent(row, number)}
    free = row.kind == "integer" and not row.block
    return {"1": represent(row, number, scale=1.0), **fitted} if free else fitted


def _formats_table() -> Table:
    table = _table("format", "bits", "layout", "largest", "smallest", "step", "scale", "bytes of 1B")
    for row in FORMATS.values():
        table.add_row(
            row.name, str(row.element_bits), _layout(row), _short(row.largest), _short(row.smallest), _short(row.step),
            _scale(row), f"{row.nbytes(BILLION):,}",
        )  # fmt: skip
    return table


def _number_table(number: float) -> Table:
    table = _table("format", f"{number!r} becomes", "error", "scale", "", "code")
    for row in FORMATS.values():
        for how, found in _representations(row, number).items():
            table.add_row(
                row.name,
                f"{found.value:.10g}",
                f"{found.error:+.3g}" if math.isfinite(found.error) else "overflow",
                "" if found.scale is None else f"{found.scale:.6g}",
                how if how == "fitted" else "",
                "" if found.code is None else f"{found.code:.6g}",
            )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _layout(row: NumberFormat) -> str:
    if row.kind == "float":
        return f"1-{row.exponent_bits}-{row.fraction_bits}"
    if row.kind == "integer":
        return f"{row.codes[0]} to {row.codes[1]}"
    return f"{len(row.grid)} values"


def _scale(row: NumberFormat) -> str:
    if row.scale == "none":
        return ""
    name = row.scale_format.removeprefix("fp8_")
    return f"{name}/{row.block}" if row.block else name


def _short(value: float) -> str:
    text = f"{value:.5g}"
    return text if len(text) <= 7 else f"{value:.3g}"


def _to_dict(row: NumberFormat, number: float | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": row.name,
        "kind": row.kind,
        "bits": row.element_bits,
        "sign_bits": 1 if row.kind != "grid" else 0,
        "exponent_bits": row.exponent_bits,
        "fraction_bits": row.fraction_bits,
        "largest": row.largest,
        "smallest_normal": row.smallest_normal,
        "smallest": row.smallest,
        "step": row.step,
        "block": row.block or None,
        "scale_bits": row.scale_bits,
        "scale_format": row.scale_format or None,
        "safetensors": row.safetensors_code,
        "bytes_per_billion": row.nbytes(BILLION),
    }
    if number is not None:
        becomes = _representations(row, number)
        facts["becomes"] = [found.to_dict() | {"scale_choice": how or None} for how, found in becomes.items()]
    return facts
