"""Rows of a data set as the model sees them: their text in pieces, each with whether it is learned.

A causal model's row holds its tokens and, one place earlier, each one's label. Every token is shown once, so the last
target of a row (or of an example in a packed row) follows it. All pieces of an example are its decoded text.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch

from brim.layers.chunked_loss import IGNORED
from brim.recipe import Recipe
from brim.training.chat import shared
from brim.training.dataset import DataSet


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens of a row."""

    text: str
    tokens: int
    learned: bool
    """Whether the model is taught to write them."""
    seen: str | None = None
    """What the model reads in their place, where that is another text: masked tokens, classes, targets."""


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row of the data set."""

    places: tuple[str, ...]
    """File and line of each example in it; empty where that is not known."""
    pieces: tuple[Piece, ...]
    padding: int
    """Tokens that fill the row up, left out of `pieces`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Token:
    id: int
    learned: bool
    seen: int | None = None
    """The token in its place, where that is another."""


def shown_rows(data: DataSet, tokenizer: Any, recipe: Recipe, count: int) -> list[ShownRow]:
    """The `count` rows that hold the first examples of the data."""
    order = list(range(len(data)))
    if recipe.training.packing and data.origins is not None:
        order.sort(key=[min(examples) for examples in data.origins.examples].__getitem__)
    return [_shown(data, row, tokenizer, recipe) for row in order[:count]]


def _shown(data: DataSet, row: int, tokenizer: Any, recipe: Recipe) -> ShownRow:
    places = tuple(data.places_of([row]))
    if recipe.task == "causal-lm":
        parts, padding = _causal(data, row)
        return ShownRow(places, tuple(piece for part in parts for piece in _pieces(part, tokenizer)), padding)
    if data.masking is not None:
        read, labels = data.masking(data.input_ids[row : row + 1], torch.Generator().manual_seed(row))
        triples = zip(data.input_ids[row].tolist(), read[0].tolist(), labels[0].tolist(), strict=True)
        tokens = [_Token(own, label != IGNORED, seen if seen != own else None) for own, seen, label in triples]
        return ShownRow(places, tuple(_pieces(tokens, tokenizer)), 0)
    assert data.attention_mask is not None
    mask = data.attention_mask[row].bool()
    read_tokens = [_Token(token, False) for token in data.input_ids[row][mask].tolist()]
    if recipe.task == "sequence-classification":
        answer = Piece(data.classes[int(data.labels[row])], 1, True, seen="")
        return ShownRow(places, (*_pieces(read_tokens, tokenizer), answer), int((~mask).sum()))
    written = [_Token(token, True) for token in data.labels[row].tolist() if token != IGNORED]
    answers = [Piece(piece.text, piece.tokens, True, seen="") for piece in _pieces(written, tokenizer)]
    return ShownRow(places, (*_pieces(read_tokens, tokenizer), *answers), int((~mask).sum()))


def _causal(data: DataSet, row: int) -> tuple[list[list[_Token]], int]:
    """(the tokens of each example in the row, tokens that fill it up)."""
    ids, labels = data.input_ids[row].tolist(), data.labels[row].tolist()
    end = len(ids)
    while ids[end - 1] == data.padding_id and labels[end - 1] == IGNORED:
        end -= 1  # never past the first: a row in which nothing is learned is not in the data
    starts = [0]
    if data.position_ids is not None:
        starts = [place for place, position in enumerate(data.position_ids[row, :end].tolist()) if not position]
    parts = []
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        tokens = [_Token(ids[start], False)]
        tokens += [_Token(ids[place], labels[place - 1] != IGNORED) for place in range(start + 1, stop)]
        tokens += [_Token(label, True) for label in labels[stop - 1 : stop] if label != IGNORED]
        parts.append(tokens)
    return parts, len(ids) - end


def _pieces(tokens: Sequence[_Token], tokenizer: Any) -> list[Piece]:
    """Neighbours that are alike together. A piece's text is what it adds to the text before it: decoded alone, many
    tokenizers leave out the blank that it begins with."""
    ids = [token.id for token in tokens]
    whole = _decoded(ids, tokenizer)
    pieces, begin, place = [], 0, 0
    for (learned, is_hidden), group in groupby(tokens, key=lambda token: (token.learned, token.seen is not None)):
        alike = list(group)
        place += len(alike)
        end = len(whole) if place == len(tokens) else max(begin, shared(_decoded(ids[:place], tokenizer), whole))
        seen = _decoded([token.id if token.seen is None else token.seen for token in alike], tokenizer)
        pieces.append(Piece(whole[begin:end], len(alike), learned, seen if is_hidden else None))
        begin = end
    return pieces


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
