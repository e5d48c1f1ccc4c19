"""Rows -> tokens of a causal model, each with whether it is learned: the answers alone, or everything."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from brim.errors import DataError
from brim.recipe import Recipe
from brim.training.chat import Span, conversation, shared
from brim.training.layouts import Message, Row


@dataclass(frozen=True, slots=True)
class Example:
    """One row of the data, tokenized."""

    ids: list[int]
    learned: list[bool]
    """For each token whether the model is to learn to write it."""


def examples_of(rows: Sequence[Row], tokenizer: Any, recipe: Recipe) -> list[Example]:
    """An example a row, in the order of the rows. Plain texts are learned whole, whatever `training.learn` says."""
    if recipe.training.pairs_as_chat:
        rows = [_as_chat(row) for row in rows]
    learn_all = recipe.training.learn == "all"
    made: dict[int, Example] = {}
    for chosen, special in (
        ([index for index, row in enumerate(rows) if not row.messages], True),
        ([index for index, row in enumerate(rows) if row.messages], False),
    ):
        texts = [_written(rows[index], tokenizer) for index in chosen]
        made |= zip(chosen, _tokenized(texts, tokenizer, special=special, learn_all=learn_all), strict=True)
    return [made[index] for index in range(len(rows))]


def _as_chat(row: Row) -> Row:
    if not row.source:
        return row
    return replace(row, messages=(Message("user", row.source), Message("assistant", row.target)))


def _written(row: Row, tokenizer: Any) -> tuple[str, list[Span] | None]:
    """(text, where its answers are); None where all of it is learned."""
    if row.messages:
        return conversation(row, tokenizer)
    return row.text, [(len(row.before), len(row.text))] if row.source else None


def _tokenized(
    texts: Sequence[tuple[str, list[Span] | None]], tokenizer: Any, *, special: bool, learn_all: bool
) -> Iterator[Example]:
    """With `special`, the tokenizer's own marks around each text (some models know texts only behind a start token, as
    at inference) and an end token; else the text has all that it needs."""
    if not texts:
        return
    find = tokenizer.is_fast and any(spans is not None for _, spans in texts) and not learn_all
    # Not verbose: what is longer than the model's positions is cut into rows, there is nothing to warn of.
    encoded = tokenizer(
        [text for text, _ in texts], add_special_tokens=special, return_offsets_mapping=find, verbose=False
    )
    end = tokenizer.eos_token_id if special else None
    for number, (text, spans) in enumerate(texts):
        ids = list(encoded["input_ids"][number])
        if learn_all or spans is None:
            learned = [True] * len(ids)
        elif find:
            learned = _within(spans, encoded["offset_mapping"][number])
        else:
            learned = _by_prefixes(text, spans, ids, tokenizer, special=special)
        if end is not None:
            ids, learned = (ids, learned) if ids[-1:] == [end] else ([*ids, end], [*learned, True])
            learned[-1] = True
        yield Example(ids, learned)


def _within(spans: Sequence[Span], places: Sequence[Span]) -> list[bool]:
    """Whether each token, told by its place in the text, has a character of a span. Some tokenizers leave blanks out of
    a token's place, and one of blanks alone then has no length: it begins where the token before it ended."""
    found, reached = [], 0
    for first, end in places:
        begin = first if first < end else min(first, reached)
        found.append(any(start < end and begin < stop for start, stop in spans))
        reached = max(reached, end)
    return found


def _by_prefixes(text: str, spans: Sequence[Span], ids: list[int], tokenizer: Any, *, special: bool) -> list[bool]:
    """For a tokenizer that does not tell places: tokens that the text up to a place has in common with the whole."""

    def tokens_before(place: int) -> int:
        return shared(tokenizer(text[:place], add_special_tokens=special, verbose=False)["input_ids"], ids)

    places = [(tokens_before(start), tokens_before(stop)) for start, stop in spans]
    return [any(first <= index < last for first, last in places) for index in range(len(ids))]


def check_texts(rows: Sequence[Row], recipe: Recipe) -> None:
    """Raises DataError for conversations where the task reads none."""
    found = next((row for row in rows if row.messages), None)
    if found is not None and recipe.task != "causal-lm":
        raise DataError(f'{found.where} is a conversation, and task = "{recipe.task}" reads none')
