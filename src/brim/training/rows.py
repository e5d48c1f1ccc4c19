"""Reads training data: JSONL, JSON, CSV or plain text into rows of source and target text."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brim.errors import DataError, did_you_mean

_LAYOUTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("prompt",), "completion"),
    (("question",), "answer"),
    (("instruction", "input"), "output"),
    (("instruction",), "output"),
    (("source",), "target"),
    ((), "text"),
)
"""Names of the columns of source and target; the first layout that a row has counts."""


_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Row:
    """One example; `source` is empty for plain text."""

    source: str
    target: str
    label: str | None = None
    """The class of a text, where the row names one."""

    @property
    def text(self) -> str:
        """As a causal model reads it."""
        return f"{self.source}\n{self.target}" if self.source else self.target


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, by its suffix: `.jsonl`, `.json` (a list), `.csv` (with a line of names), else plain text as
    one row.

    Raises DataError naming the file, and the line where there is one.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"data {path} does not exist") from None
    except OSError as error:
        raise DataError(f"data {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    if path.suffix.lower() not in (".jsonl", ".json", ".csv"):
        rows = [Row("", text)] if text.strip() else []
    else:
        rows = [_row(value, where=where) for where, value in _values(path, text)]
    if not rows:
        raise DataError(f"data {path} is empty: no row to learn from")
    return rows


def _values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() == ".json":
        values = _parse(text, path) if text.strip() else []
        if not isinstance(values, list):
            raise DataError(f"{path}: not a list of rows; write [{{...}}, {{...}}] or use .jsonl, one object a line")
        yield from ((f"{path}, row {index}", value) for index, value in enumerate(values, 1))
        return
    if path.suffix.lower() == ".csv":
        yield from _table(path, text)
        return
    # Not splitlines: it also cuts at separators that a JSON string may hold, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _parse(line, path, number, hint="; each line must be one object")


def _table(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file; a quoted value may hold commas and line ends, and a row is named by its last line."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for values in reader:
            where = f"{path}, line {reader.line_num}"
            if None in values or None in values.values():
                found = len(values) - 1 + len(values[None]) if None in values else sum(map(bool, values.values()))
                raise DataError(
                    f"{where}: {found} values under {len(reader.fieldnames or ())} names; quote a value that holds a "
                    "comma or a line end"
                )
            yield where, values
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: not CSV ({error})") from None


def _parse(text: str, path: Path, first_line: int = 1, *, hint: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}, line {line}: not JSON ({error.msg}){hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {first_line}: not JSON that can be read ({error}){hint}") from None


def _row(value: Any, *, where: str) -> Row:
    if not isinstance(value, Mapping):
        raise DataError(f'{where}: not an object; write {{"text": "..."}}')
    for sources, target in _LAYOUTS:
        if target in value and all(name in value for name in sources):
            parts = [value[name] for name in (*sources, target)]
            if not all(isinstance(part, str) for part in parts):
                raise DataError(f"{where}: {', '.join((*sources, target))} must be texts")
            if any(map(_SURROGATE.search, parts)):
                raise DataError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no character; remove it")
            if not parts[-1].strip():
                raise DataError(f"{where}: {target!r} is empty: nothing to learn")
            return Row("\n".join(part for part in parts[:-1] if part), parts[-1], _label(value, where=where))
    known = sorted({name for sources, target in _LAYOUTS for name in (*sources, target)})
    hints = "".join(did_you_mean(name, known) for name in list(value)[:4])
    layouts = "; ".join("+".join((*sources, target)) for sources, target in _LAYOUTS)
    raise DataError(f"{where}: columns {', '.join(map(str, value))} are no known layout ({layouts}){hints}")


def _label(value: Mapping[str, Any], *, where: str) -> str | None:
    label = value.get("label")
    if label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise DataError(f"{where}: label {label!r} is neither the name of a class nor its number")
    return str(label)
