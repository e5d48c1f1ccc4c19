"""`--modules`: which module holds the bytes of the peak, as lines that no terminal cuts: a cut name names nothing."""

from collections.abc import Sequence

from brim.cli import console
from brim.report import LEDGER_LINES, Ledger, ModuleRow
from brim.units import format_bytes

_ROWS_SHOWN = 24
_REST = "all else"
_COLUMNS = ("weights", "gradients", "optimizer", "activations")


def show(rows: Sequence[ModuleRow]) -> None:
    """The largest rows, those that are left in one, and their total."""
    total = summed(rows)
    columns = [line for line in _COLUMNS if getattr(total, line)]
    _print([*columns, _REST, "total"], "module, at the peak")
    for row in rows[:_ROWS_SHOWN]:
        _print(_cells(row.ledger, columns), row.module + (f" x{row.count}" if row.count > 1 else ""))
    left = rows[_ROWS_SHOWN:]
    if left:
        _print(_cells(summed(left), columns), f"({len(left)} more, in --json)")
    _print(_cells(total, columns), "together")


def summed(rows: Sequence[ModuleRow]) -> Ledger:
    """All rows in one ledger."""
    return Ledger(**{line: sum(getattr(row.ledger, line) for row in rows) for line in LEDGER_LINES})


def _cells(ledger: Ledger, columns: Sequence[str]) -> list[str]:
    named = [int(getattr(ledger, column)) for column in columns]
    return [format_bytes(nbytes) if nbytes else "" for nbytes in (*named, ledger.total - sum(named), ledger.total)]


def _print(cells: Sequence[str], name: str) -> None:
    numbers = "".join(f"{cell:>12}" for cell in cells)
    console.out.print(f"{numbers}  {name}", markup=False, soft_wrap=True)
