"""Training data: each layout is read, each kind of bad file is refused with its place."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.errors import DataError
from brim.training.layouts import Row
from brim.training.rows import read_rows

CHARACTERS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


def write(tmp_path: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("row", "source", "target"),
    [
        ({"text": "a"}, "", "a"),
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"question": "a", "answer": "b", "id": 7}, "a", "b"),
        ({"instruction": "a", "input": "c", "output": "b"}, "a\nc", "b"),
        ({"instruction": "a", "input": "", "output": "b"}, "a", "b"),
        ({"instruction": "a", "output": "b"}, "a", "b"),
        ({"source": "a", "target": "b"}, "a", "b"),
    ],
)
def test_layouts(tmp_path: Path, row: dict[str, Any], source: str, target: str) -> None:
    """Each layout gives source and target, the same from a list as from lines; a causal model reads both."""
    lines = write(tmp_path, f"{json.dumps(row)}\n\n{json.dumps(row)}\r\n")
    whole = write(tmp_path, json.dumps([row, row]), "data.JSON")
    assert read_rows(lines) == read_rows(whole) == [Row(source, target)] * 2
    assert read_rows(lines)[0].text == (f"{source}\n{target}" if source else target)


TALK = [("system", "s"), ("user", "u"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("column", "role", "content", "names"),
    [
        ("messages", "role", "content", {}),
        ("conversations", "from", "value", {"user": "human", "assistant": "gpt"}),
        ("conversations", "role", "content", {}),
    ],
)
def test_conversations(tmp_path: Path, column: str, role: str, content: str, names: dict[str, str]) -> None:
    """OpenAI's messages and ShareGPT's conversations are the same turns; a prompt beside them is not read."""
    turns = [{role: names.get(who, who), content: said} for who, said in TALK]
    (row,) = read_rows(write(tmp_path, json.dumps({"prompt": "u", "completion": "a", column: turns})))
    assert [(message.role, message.content) for message in row.messages] == TALK


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "not a list of turns"),
        ([{"role": "user", "content": "u"}], "no turn of the assistant"),
        ([{"role": "asistant", "content": "u"}], r"messages\[0\].*'asistant'.*assistant"),
        ([{"role": "user"}], r"messages\[0\] is no turn"),
        ([{"role": "assistant", "content": " "}], "empty: nothing to learn"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content must be a text"),
    ],
)
def test_bad_conversations_are_refused(tmp_path: Path, turns: Any, said: str) -> None:
    """Each refusal names the file, the line and the turn."""
    path = write(tmp_path, '{"text": "a"}\n' + json.dumps({"messages": turns}))
    with pytest.raises(DataError, match=f"data.jsonl.*2.*{said}"):
        read_rows(path)


def test_plain_text_is_one_row(tmp_path: Path) -> None:
    """A file of another suffix is one text, byte for byte but for the mark that some editors put first."""
    assert read_rows(write(tmp_path, b"\xef\xbb\xbfa\r\nb\n", "book.txt")) == [Row("", "a\r\nb\n")]


@given(texts=st.lists(CHARACTERS, min_size=1, max_size=5), escaped=st.booleans())
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str], escaped: bool) -> None:
    """Whatever characters a text holds (line separators too), a line of JSON brings it through."""
    content = "\n".join(json.dumps({"text": text}, ensure_ascii=escaped) for text in texts)
    assert [row.target for row in read_rows(write(tmp_path_factory.mktemp("rows"), content))] == texts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.txt", " \n", "is empty"),
        ("a.txt", b"fine\nfine\n\xff", "a.txt, line 3: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xc3("}', "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": a}', "a.jsonl, line 3: not JSON"),
        ("a.json", '[{"text": "a"},\n{"text": }]', "a.json, line 2: not JSON"),
        ("a.json", '{"text": "a"}', "not a list"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "a.jsonl, line 1: not JSON"),
        ("a.jsonl", '{"text": "a"}\n"b"', "a.jsonl, line 2: not an object"),
        ("a.json", '[{"text": "a"}, 3]', "a.json, row 2: not an object"),
        ("a.jsonl", '{"text": 3}', "a.jsonl, line 1: text must be texts"),
        ("a.jsonl", '{"prompt": null, "completion": "b"}', "must be texts"),
        ("a.jsonl", '{"prompt": "a", "completion": " "}', "'completion' is empty"),
        ("a.jsonl", '{"text": "\\ud800"}', "a.jsonl, line 1: half of a surrogate pair"),
        ("a.jsonl", '{"promt": "a", "completion": "b"}', "did you mean prompt"),
        ("a.jsonl", '{"x": 1, "y": 2}', "columns x, y are no known layout"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    """Each way of getting a file wrong is a DataError (exit 4) that names the file and the place in it."""
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, content, name))
    assert said in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert caught.value.exit_code == 4


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is missing, a directory or closed to us is said to be so."""
    with pytest.raises(DataError, match=r"none\.txt does not exist"):
        read_rows(tmp_path / "none.txt")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_rows(tmp_path)

    def closed(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", closed)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read_rows(tmp_path / "mine.txt")


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)


@given(st.lists(st.tuples(TEXTS, TEXTS.filter(str.strip)), min_size=1))
def test_csv_gives_the_rows_of_jsonl(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    """What csv's writer made of texts (commas, quotes and line ends among them) is read as the same texts in JSONL."""
    place = tmp_path_factory.mktemp("rows")
    with (place / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("prompt", "completion"), *pairs])
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    (place / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_rows(place / "rows.csv") == read_rows(place / "rows.jsonl")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,completion\na,b\nc,d,e\n", r"line 3: 3 values under 2 names"),
        ("prompt,completion\na,b\nc\n", r"line 3: 1 values under 2 names"),
        ('prompt,completion\na,"b\n', r"line 2: not CSV"),
        ("prompt,completion\na,b\n\nc,\n", r"line 4: 'completion' is empty"),
        ("promt,completion\na,b\n", r"line 2: columns promt, completion are no known layout.*prompt"),
        ("prompt,completion\n", r"is empty"),
    ],
)
def test_csv_that_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    """Each way to be wrong names the file's line."""
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_rows(path)
