"""`--modules`: which module holds the bytes of the peak, as a table."""

from collections.abc import Sequence

from rich.table import Table

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
    table = Table(title="at the peak, module by module", title_justify="left", box=None, pad_edge=False)
    table.add_column("module", overflow="fold")
    for column in (*columns, _REST, "total"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows[:_ROWS_SHOWN]:
        times = f" x{row.count}" if row.count > 1 else ""
        table.add_row(f"{row.module}{times}", *_cells(row.ledger, columns))
    left = rows[_ROWS_SHOWN:]
    if left:
        table.add_row(f"{len(left)} more, in --json", *_cells(summed(left), columns))
    table.add_section()
    table.add_row("total", *_cells(total, columns))
    console.out.print(table, markup=False)


def summed(rows: Sequence[ModuleRow]) -> Ledger:
    """All rows in one ledger."""
    return Ledger(**{line: sum(getattr(row.ledger, line) for row in rows) for line in LEDGER_LINES})


def _cells(ledger: Ledger, columns: Sequence[str]) -> list[str]:
    named = [int(getattr(ledger, column)) for column in columns]
    return [format_bytes(nbytes) if nbytes else "" for nbytes in (*named, ledger.total - sum(named), ledger.total)]
