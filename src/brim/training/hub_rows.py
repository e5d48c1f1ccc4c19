"""Rows of Parquet files and of data sets on the Hub, by the libraries of the `hub-data` extra.

A Hub id: `ORG/NAME`, then if need be `/CONFIG`, `@REVISION` and `:SPLIT` (train, or a slice as `train[:1000]`).
`datasets` runs no code of a data set, and keeps what it fetched in HF_HOME; HF_HUB_OFFLINE is obeyed.
"""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from brim.errors import DataError, MissingPartError
from brim.hardware.checkup import OPTIONAL

_HUB_ID = re.compile(
    r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<split>\w+(?:\[[\d:%]*\])?))?"
)


def is_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None


def parquet_values(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, columns) of each row. Raises DataError naming the file."""
    arrow, parquet = _optional("pyarrow", path), _optional("pyarrow.parquet", path)
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", _present(value)
    except FileNotFoundError:
        raise DataError(f"data {path} does not exist") from None
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path} is not Parquet that can be read: {_first_line(error)}") from None


def hub_values(source: str) -> Iterator[tuple[str, Any]]:
    """(place, columns) of each row of a data set on the Hub. Raises DataError naming it."""
    match = _HUB_ID.fullmatch(source)
    assert match is not None
    name, split = match["id"], match["split"] or "train"
    datasets = _optional("datasets", source)
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, match["config"], split=split, revision=match["revision"])
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data {source}: no file of that name is here, and as a Hub id (ORG/NAME/CONFIG@REVISION:SPLIT) it cannot "
            f"be read: {_first_line(error)}"
        ) from None
    for number, value in enumerate(found, 1):
        yield f"{name}:{split}, row {number}", _present(value)


def _present(value: dict[str, Any]) -> dict[str, Any]:
    """Without the columns that other rows have and this one does not: a table writes null there."""
    return {key: part for key, part in value.items() if part is not None}


def _optional(module: str, wanted: object) -> Any:
    """A library of the extra: half a second to import, so only when it is needed."""
    try:
        return import_module(module)
    except ImportError:
        raise MissingPartError(f"reading {wanted} needs: {OPTIONAL['datasets']}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
