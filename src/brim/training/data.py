"""Rows -> micro-batches of the recipe's exact shape.

Causal: rows are joined with an end token between them and cut into blocks, so no token is padding (but for the end of
the last block). Masked: the same, with the tokenizer's own marks; the last block is filled up from the beginning.
Sequence-to-sequence and classification: each row is cut or padded to the recipe's lengths.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from brim.errors import DataError
from brim.layers.chunked_loss import IGNORED
from brim.recipe import Recipe
from brim.training.dataset import Counts, DataSet, Origins
from brim.training.examples import check_texts, examples_of
from brim.training.layouts import Row
from brim.training.masking import Masking
from brim.training.packing import pack, targets


def tokenize(rows: Sequence[Row], tokenizer: Any, recipe: Recipe) -> DataSet:
    """The rows in the recipe's shape. Raises DataError when there is nothing to predict."""
    check_texts(rows, recipe)
    if recipe.task == "seq2seq-lm":
        return _pairs(rows, tokenizer, recipe)
    if recipe.task == "masked-lm":
        return _masked_blocks(rows, tokenizer, recipe)
    if recipe.task == "sequence-classification":
        return _labelled(rows, tokenizer, recipe)
    if recipe.training.packing:
        return _packed(rows, tokenizer, recipe)
    return _blocks(rows, tokenizer, recipe)


def _packed(rows: Sequence[Row], tokenizer: Any, recipe: Recipe) -> DataSet:
    """Whole examples, each with its end token, as many to a row as go in."""
    end = tokenizer.eos_token_id
    examples = examples_of(rows, tokenizer, recipe)
    if not any(any(example.learned[1:]) for example in examples):
        raise DataError("no example of the data has two tokens: there is no next token to learn")
    padding = end if end is not None else 0
    packed = pack(examples, recipe.seq_len, padding=padding)
    return DataSet(
        input_ids=packed.input_ids,
        labels=packed.labels,
        position_ids=packed.position_ids,
        origins=Origins(_places(rows), packed.origins),
        counts=_counted([len(example.ids) for example in examples], recipe.seq_len + 1, packed.labels),
        padding_id=padding,
    )


def _blocks(rows: Sequence[Row], tokenizer: Any, recipe: Recipe) -> DataSet:
    """Each label is the token after its input token; the last block is filled up with tokens that have no label. A
    block in which nothing is learned is left out."""
    examples = examples_of(rows, tokenizer, recipe)
    stream = [token for example in examples for token in example.ids]
    learned = [wanted for example in examples for wanted in example.learned]
    if not any(learned[1:]):
        raise DataError("the data is one token long: there is no next token to learn")
    length, end = recipe.seq_len, tokenizer.eos_token_id
    missing = -(len(stream) - 1) % length
    padding = end if end is not None else 0
    inputs = torch.tensor(stream[:-1] + [padding] * missing).view(-1, length)
    labels = torch.tensor(targets(stream[1:], learned[1:]) + [IGNORED] * missing).view(-1, length)
    taught = (labels != IGNORED).any(dim=1)
    ends = list(accumulate(len(example.ids) for example in examples))
    # A block reads one token more than it is long: its last target.
    firsts = [place * length for place, wanted in enumerate(taught.tolist()) if wanted]
    spans = [(bisect_right(ends, first), bisect_right(ends, min(first + length, ends[-1] - 1))) for first in firsts]
    return DataSet(
        input_ids=inputs[taught],
        labels=labels[taught],
        origins=Origins(_places(rows), tuple(tuple(range(first, last + 1)) for first, last in spans)),
        counts=_counted([len(example.ids) for example in examples], length + 1, labels),
        padding_id=padding,
    )


def _places(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(row.where for row in rows)


def _one_each(rows: Sequence[Row]) -> Origins:
    return Origins(_places(rows), tuple((index,) for index in range(len(rows))))


def _counted(lengths: Sequence[int], longest: int, labels: Tensor) -> Counts:
    """`longest`: of an example that is not cut."""
    return Counts(
        examples=len(lengths),
        tokens=sum(lengths),
        learned=int((labels != IGNORED).sum()),
        longest=max(lengths),
        cut=sum(length > longest for length in lengths),
    )


def _masked_blocks(rows: Sequence[Row], tokenizer: Any, recipe: Recipe) -> DataSet:
    """Rows with the tokenizer's marks around each, cut into blocks; no block holds padding."""
    masking = Masking.of(tokenizer)
    encoded = tokenizer([row.text for row in rows], verbose=False)["input_ids"]
    stream = [(token, example) for example, ids in enumerate(encoded) for token in ids]
    if masking.special_ids.issuperset(token for token, _ in stream):
        raise DataError("the data has no token that could be masked")
    missing = -len(stream) % recipe.seq_len
    rounds = -(-missing // len(stream))
    filled = torch.tensor(stream + (stream * rounds)[:missing]).view(-1, recipe.seq_len, 2)
    blocks, examples = filled[..., 0].contiguous(), filled[..., 1]
    _, labels = masking(blocks, torch.Generator())  # as many are masked each time
    return DataSet(
        input_ids=blocks,
        labels=blocks,
        masking=masking,
        origins=Origins(_places(rows), tuple(tuple(row.unique().tolist()) for row in examples)),
        counts=_counted([len(ids) for ids in encoded], recipe.seq_len, labels),
    )


def _labelled(rows: Sequence[Row], tokenizer: Any, recipe: Recipe) -> DataSet:
    names = [row.label for row in rows if row.label is not None]
    if len(names) < len(rows):
        without = next(row for row in rows if row.label is None)
        raise DataError(f'{without.where}: classification data needs a "label" beside the "text" in each row')
    classes = _classes(names, recipe.num_labels)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise DataError("the tokenizer has neither a padding nor an end token to fill rows up with")
    texts, lengths = _cut([row.text for row in rows], recipe.seq_len, tokenizer)
    labels = torch.tensor([classes.index(name) for name in names])
    on_the_left = tokenizer.padding_side == "left"
    return DataSet(
        input_ids=_filled(texts, recipe.seq_len, tokenizer.pad_token_id, on_the_left=on_the_left),
        labels=labels,
        attention_mask=_filled([[1] * len(ids) for ids in texts], recipe.seq_len, 0, on_the_left=on_the_left),
        origins=_one_each(rows),
        counts=_counted(lengths, recipe.seq_len, labels),
        classes=classes,
        padding_id=tokenizer.pad_token_id,
    )


def _classes(names: Sequence[str], num_labels: int) -> tuple[str, ...]:
    """Names in order of their number: numbers stand for themselves, texts are numbered by the alphabet."""
    numbers = tuple(str(number) for number in range(num_labels))
    found = sorted(set(names))
    if set(found) <= set(numbers):
        return numbers
    if len(found) > num_labels:
        raise DataError(
            f"the data has {len(found)} classes ({', '.join(found[:4])}, ...) and the recipe {num_labels}: "
            f"write num_labels = {len(found)}"
        )
    return (*found, *(f"unused {number}" for number in range(len(found), num_labels)))


def _pairs(rows: Sequence[Row], tokenizer: Any, recipe: Recipe) -> DataSet:
    if plain := next((row for row in rows if not row.source), None):
        raise DataError(
            f"{plain.where}: sequence-to-sequence data needs a source and a target in each row; this is plain text"
        )
    sources, lengths = _cut([row.source for row in rows], recipe.seq_len, tokenizer)
    answers, answer_lengths = _cut([row.target for row in rows], recipe.target_len, tokenizer, are_targets=True)
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id or 0
    labels = _filled([_ended(ids, end, recipe.target_len) for ids in answers], recipe.target_len, IGNORED)
    counts = _counted(lengths, recipe.seq_len, labels)
    pairs = list(zip(lengths, answer_lengths, strict=True))
    return DataSet(
        input_ids=_filled(sources, recipe.seq_len, padding),
        labels=labels,
        attention_mask=_filled([[1] * len(ids) for ids in sources], recipe.seq_len, 0),
        origins=_one_each(rows),
        counts=replace(
            counts,
            tokens=sum(source + target for source, target in pairs),
            cut=sum(source > recipe.seq_len or target > recipe.target_len for source, target in pairs),
        ),
    )


def _cut(
    texts: Sequence[str], length: int, tokenizer: Any, *, are_targets: bool = False
) -> tuple[list[list[int]], list[int]]:
    """(tokens of each text, at most `length`; tokens that each has uncut)."""
    name = "text_target" if are_targets else "text"
    ids = tokenizer(**{name: list(texts)}, verbose=False)["input_ids"]
    lengths = [len(tokens) for tokens in ids]
    # The tokenizer cuts them itself: what marks an end stays there.
    long = [index for index, tokens in enumerate(ids) if len(tokens) > length]
    if long:
        cut = tokenizer(**{name: [texts[index] for index in long]}, max_length=length, truncation=True)["input_ids"]
        for index, tokens in zip(long, cut, strict=True):
            ids[index] = tokens
    return ids, lengths


def _ended(ids: list[int], end: int | None, length: int) -> list[int]:
    """With the end token last, which is how the model learns to stop; a target that was cut has it, too."""
    return ids if end is None or ids[-1:] == [end] else [*ids[: length - 1], end]


def _filled(rows: list[list[int]], length: int, filling: int, *, on_the_left: bool = False) -> Tensor:
    fillings = [[filling] * (length - len(row)) for row in rows]
    pairs = zip(fillings, rows, strict=True) if on_the_left else zip(rows, fillings, strict=True)
    return torch.tensor([first + second for first, second in pairs])
