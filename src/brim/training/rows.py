"""Reads training data into rows: JSONL, JSON, CSV, Parquet or plain text, or a data set on the Hub."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brim.errors import DataError
from brim.training.hub_rows import hub_values, is_hub_id, parquet_values
from brim.training.layouts import Row, row_of

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")


def read_rows(source: Path) -> list[Row]:
    """The rows of a file, by its suffix: `.jsonl`, `.json` (a list), `.csv` (with a line of names), `.parquet`, else
    plain text as one row. What is no file here and has the form of a Hub id is one.

    Raises DataError naming the file, and the line where there is one; MissingPartError where a library is missing.
    """
    rows = [row_of(value, where=where) if where else value for where, value in _found(source)]
    if not rows:
        raise DataError(f"data {source} is empty: no row to learn from")
    return rows


def _found(source: Path) -> Iterator[tuple[str, Any]]:
    """(place, columns) of each row; of plain text the row itself, without a place."""
    suffix = source.suffix.lower()
    if not source.exists() and suffix not in _SUFFIXES and is_hub_id(str(source)):
        yield from hub_values(str(source))
    elif suffix == ".parquet":
        yield from parquet_values(source)
    elif suffix in (".jsonl", ".json", ".csv"):
        yield from _values(source, _text_of(source))
    elif (text := _text_of(source)).strip():
        yield "", Row("", text, where=str(source))


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"data {path} does not exist") from None
    except OSError as error:
        raise DataError(f"data {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


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
