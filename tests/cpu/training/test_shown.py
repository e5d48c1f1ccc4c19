"""Data shown before a run: every token once, marked by whether it is learned, and counted."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from brim.cli import console, main, shown
from brim.recipe import Recipe, Training
from brim.training.data import tokenize
from brim.training.layouts import Row
from brim.training.shown import shown_rows

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=24)
ROWS = st.lists(st.tuples(st.one_of(st.just(""), TEXTS), TEXTS), min_size=1, max_size=6)


def masked_tokenizer(tokenizer: Any) -> Any:
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    other.add_special_tokens({"mask_token": "#", "pad_token": "<end>"})
    return other


@settings(max_examples=30)
@given(pairs=ROWS, length=st.integers(2, 20), packing=st.booleans())
def test_pieces_are_the_text(tokenizer: Any, pairs: list[tuple[str, str]], length: int, packing: bool) -> None:
    """The pieces of a row are what its tokens decode to, and all rows together show as many learned tokens as the data
    has labels: for blocks exactly the answers' characters that have a token before them."""
    rows = [Row(source, target) for source, target in pairs]
    recipe = Recipe(model="any", seq_len=length, training=Training(packing=packing))
    data = tokenize(rows, tokenizer, recipe)
    found = shown_rows(data, tokenizer, recipe, len(data))
    assert data.counts is not None
    assert sum(piece.tokens for row in found for piece in row.pieces if piece.learned) == data.counts.learned
    if not packing and length >= data.counts.tokens:
        (row,) = found
        assert "".join(piece.text for piece in row.pieces) == "".join(row.text + tokenizer.eos_token for row in rows)
        learned = "".join(row.target + tokenizer.eos_token for row in rows)
        first = 0 if rows[0].source else len(tokenizer("".join(row.text for row in rows)[:1])["input_ids"])
        assert sum(piece.tokens for piece in row.pieces if piece.learned) == (
            len(tokenizer(learned)["input_ids"]) - min(first, 1)
        )


def test_packed_rows_show_whole_examples(tokenizer: Any) -> None:
    """A packed row shows each example from its first token to the end that is learned, and counts what fills it up."""
    rows = [Row("ask", "answer", where="line 1"), Row("", "text", where="line 2")]
    recipe = Recipe(model="any", seq_len=24, training=Training(packing=True))
    (row,) = shown_rows(tokenize(rows, tokenizer, recipe), tokenizer, recipe, 3)
    assert [(piece.text, piece.learned) for piece in row.pieces] == [
        ("ask\n", False), ("answer<end>", True), ("t", False), ("ext<end>", True),
    ]  # fmt: skip
    assert row.places == ("line 1", "line 2")
    assert row.padding == 24 - len("ask\nanswer") - len("text")


def test_pairs_show_source_and_target(tokenizer: Any) -> None:
    """Sequence-to-sequence: the source is read, the target is learned with its end; what is cut is not shown, and
    counted. Nothing is tokenized twice but what is cut."""
    recipe = Recipe(model="any", task="seq2seq-lm", seq_len=6, target_seq_len=4)
    rows = [Row("ab", "xy"), Row("a" * 9, "xyxyxy"), Row("a", "z" * 9)]
    data = tokenize(rows, tokenizer, recipe)
    found = shown_rows(data, tokenizer, recipe, 2)
    assert [(piece.text, piece.learned, piece.seen) for piece in found[0].pieces] == [
        ("ab", False, None), ("xy<end>", True, ""),
    ]  # fmt: skip
    assert [piece.text for piece in found[1].pieces] == ["a" * 6, "xyx<end>"]
    assert (found[0].padding, found[1].padding) == (4, 0)
    assert data.counts is not None
    counts = data.counts.to_dict()
    assert counts == {"examples": 3, "tokens": 2 + 9 + 1 + 2 + 6 + 9, "learned": 3 + 4 + 4, "longest": 9, "cut": 2}
    seen: list[int] = []

    class Listening:
        def __call__(self, *values: Any, **named: Any) -> Any:
            seen.append(len(named.get("text") or named["text_target"]))
            return tokenizer(*values, **named)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    tokenize(rows, Listening(), recipe)
    assert seen == [3, 1, 3, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_classes_are_shown_and_padded_as_the_tokenizer_does(tokenizer: Any, side: str) -> None:
    """Classification: rows are what the tokenizer makes of them, cut and padded by itself; the class is learned."""
    other = masked_tokenizer(tokenizer)
    other.padding_side = side
    recipe = Recipe(model="any", task="sequence-classification", seq_len=8)
    texts = ["good", "much too long a text", "bad one."]
    data = tokenize([Row("", text, label) for text, label in zip(texts, "aba", strict=True)], other, recipe)
    theirs = other(texts, max_length=8, padding="max_length", truncation=True, return_tensors="pt")
    assert data.input_ids.tolist() == theirs["input_ids"].tolist()
    assert data.attention_mask is not None
    assert data.attention_mask.tolist() == theirs["attention_mask"].tolist()
    found = shown_rows(data, other, recipe, 2)
    assert [(piece.text, piece.learned) for piece in found[1].pieces] == [("much too", False), ("b", True)]
    assert data.counts is not None
    assert (data.counts.cut, data.counts.longest) == (1, len(texts[1]))


def test_masked_tokens_are_shown_beside_what_is_read(tokenizer: Any) -> None:
    """Masked-lm: the text is whole, learned where a token is hidden, and as many are as are counted; each row knows
    its examples, the last the first ones that fill it up."""
    other = masked_tokenizer(tokenizer)
    recipe = Recipe(model="any", task="masked-lm", seq_len=20)
    rows = [Row("", letter * 25, where=letter) for letter in "abc"]
    data = tokenize(rows, other, recipe)
    found = shown_rows(data, other, recipe, 9)
    assert "".join(piece.text for row in found for piece in row.pieces) == "a" * 25 + "b" * 25 + "c" * 25 + "a" * 5
    assert data.counts is not None
    assert sum(p.tokens for row in found for p in row.pieces if p.learned) == data.counts.learned == 4 * 3
    hidden = [piece for row in found for piece in row.pieces if piece.seen is not None]
    assert hidden and all(piece.learned and piece.seen != piece.text for piece in hidden)
    assert [row.places for row in found] == [("a",), ("a", "b"), ("b", "c"), ("a", "c")]


def test_show_data_ends_before_anything_is_trained(
    tiny_directory: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], no_colour: None
) -> None:
    """`--show-data` marks what is trained in plain text, tells the same with `--json`, and leaves nothing behind."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "[ask]", "completion": "answer"}\n')
    arguments = ["tune", str(tiny_directory("gpt2")), "--data", str(data), "--seq-len", "16", "--show-data"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        f"row 1 of 1: {data}, line 1 (13 tokens, 7 trained, filled up with 4)",
        "[ask]",
        "{+answer<end>+}",
        "data: 1 examples, 13 tokens in 1 rows of 16, 7 trained, longest 13",
    ]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["counts"]["learned"] == 7
    assert [(p["text"], p["learned"]) for p in told["rows"][0]["pieces"]] == [("[ask]\n", False), ("answer<end>", True)]
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.fixture
def no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "out", Console(force_terminal=False, highlight=False, soft_wrap=True))


def test_a_terminal_shows_colours(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal what is trained has another colour and no marks; NO_COLOR brings the marks back."""
    recipe = Recipe(model="any", seq_len=16)
    data = tokenize([Row("ask", "answer")], tokenizer, recipe)
    for name, is_marked in (("TERM", False), ("NO_COLOR", True)):
        monkeypatch.setenv(name, "xterm-256color")
        file = io.StringIO()
        monkeypatch.setattr(console, "out", Console(force_terminal=True, file=file, width=100))
        shown.show_data(data, tokenizer, recipe, json=False)
        assert ("{+answer<end>+}" in file.getvalue()) is is_marked
        assert ("\x1b[1;32manswer<end>" in file.getvalue()) is not is_marked


@pytest.mark.parametrize(("done", "said"), [(0, "10 steps of 2 rows, about 5.0 s"), (4, "4 of them done, about 3.0 s")])
def test_the_line_before_a_start(tokenizer: Any, make_run: Any, done: int, said: str) -> None:
    """The time told is that of the steps that are left."""
    job = make_run("gpt2", training=Training(max_steps=10))
    assert said in shown.time_line(job.data, job.recipe, job.predicted, steps_done=done)
    spread = replace(job.predicted, step_time_range_s=(0.25, 1.0))
    assert "(1.5 s to 6.0 s)" in shown.time_line(job.data, job.recipe, spread, steps_done=4)
