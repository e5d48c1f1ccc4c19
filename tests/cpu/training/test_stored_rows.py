"""Rows of Parquet files and of data sets on the Hub are those of the same values in JSONL; errors have a place."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from brim.errors import DataError, MissingPartError
from brim.training import hub_rows
from brim.training.layouts import Row
from brim.training.rows import read_rows

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
TURNS = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]


def as_parquet(path: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    parquet.write_table(table, path, **settings)
    return path


def as_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@settings(max_examples=20)
@given(
    pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=7),
    compression=st.sampled_from(["none", "snappy", "zstd", "gzip"]),
    group=st.integers(1, 4),
    layout=st.sampled_from([("prompt", "completion"), ("source", "target"), ("instruction", "output")]),
)
def test_parquet_is_what_lines_are(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[str, str]],
    compression: str,
    group: int,
    layout: tuple[str, str],
) -> None:
    """However it is compressed and cut into groups, a Parquet file has the rows of the same values in lines, in their
    order, and each knows its number."""
    place = tmp_path_factory.mktemp("rows")
    values = [dict(zip(layout, pair, strict=True)) for pair in pairs]
    file = as_parquet(place / "data.parquet", values, compression=compression, row_group_size=group)
    rows = read_rows(file)
    assert rows == read_rows(as_lines(place / "data.jsonl", values))
    assert [row.where for row in rows] == [f"{file}, row {number}" for number in range(1, len(pairs) + 1)]


def test_parquet_has_conversations_and_gaps(tmp_path: Path) -> None:
    """Turns are lists of structures; a column that a row lacks, which a table fills with null, is not there."""
    values: list[dict[str, Any]] = [
        {"messages": TURNS},
        {"text": "plain"},
        {"instruction": "ask", "output": "answer", "label": "good"},
        {"instruction": "ask", "input": "of", "output": "answer", "label": None},
    ]
    rows = read_rows(as_parquet(tmp_path / "data.PARQUET", values))
    assert rows == read_rows(as_lines(tmp_path / "data.jsonl", values))
    assert [len(row.messages) for row in rows] == [2, 0, 0, 0]
    assert rows[2:] == [Row("ask", "answer", "good"), Row("ask\nof", "answer")]


def test_parquet_of_other_kinds_of_text(tmp_path: Path) -> None:
    """Texts by dictionary and with 64-bit places are texts."""
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(["a", "b", "a"], kind)}), tmp_path / "data.parquet")
        assert [row.target for row in read_rows(tmp_path / "data.parquet")] == ["a", "b", "a"]


def test_what_is_wrong_with_parquet(tmp_path: Path) -> None:
    """A file that is none, is cut, is empty or is not there, and a row of no layout, are told by file and row."""
    file = as_parquet(tmp_path / "data.parquet", [{"text": "a"}, {"txt": "b"}])
    with pytest.raises(DataError, match=r"data\.parquet, row 2: columns txt are no known layout.*did you mean text"):
        read_rows(file)
    whole = file.read_bytes()
    for content in (whole[:-9], whole[: len(whole) // 2], b"PAR1", b"", whole[:-8] + b"\xff" * 4 + whole[-4:]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"data\.parquet is not Parquet that can be read: \S"):
            read_rows(file)
    file.unlink()
    with pytest.raises(DataError, match="does not exist"):
        read_rows(file)
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), file)
    with pytest.raises(DataError, match="is empty: no row"):
        read_rows(file)


def test_a_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the message holds the command that installs it."""

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(hub_rows, "import_module", missing)
    file = as_parquet(tmp_path / "data.parquet", [{"text": "a"}])
    for source in (file, Path("org/name")):
        with pytest.raises(MissingPartError, match=r"reading .* needs: pip install 'brim\[hub-data\]'"):
            read_rows(source)


def test_rows_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `datasets` itself, where it is installed, from a data set of the Hub's form that lies here: rows, a split, a
    slice of it, and what is not there; columns that a row lacks are not there either."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "org" / "name"
    place.mkdir(parents=True)
    values: list[dict[str, Any]] = [{"text": "plain"}, {"prompt": "ask", "completion": "answer"}, {"messages": TURNS}]
    as_lines(place / "train.jsonl", values)
    as_lines(place / "test.jsonl", values[:1])
    # What lies here under the name of a Hub id is a directory and no data file: read_rows would read it as text.
    found = list(hub_rows.hub_values("org/name"))
    assert [value for _, value in found] == values
    assert [where for where, _ in found] == [f"org/name:train, row {number}" for number in (1, 2, 3)]
    assert [value for _, value in hub_rows.hub_values("org/name:test")] == values[:1]
    assert [value for _, value in hub_rows.hub_values("org/name:train[:2]")] == values[:2]
    for source in ("org/name:validation", "org/none"):
        with pytest.raises(DataError, match=f"data {source}: .*cannot be read: \\S"):
            list(hub_rows.hub_values(source))
