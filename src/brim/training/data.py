"""Rows of text -> micro-batches of the recipe's exact shape, in an order that the seed decides.

Causal: rows are joined with an end token between them and cut into blocks, so no token is padding (but for the end of
the last block). Masked: the same, with the tokenizer's own marks; the last block is filled up from the beginning.
Sequence-to-sequence and classification: each row is cut or padded to the recipe's lengths.

Shapes: R rows of the data set, T tokens of a row (S of a source row).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from brim.errors import DataError
from brim.layers.chunked_loss import IGNORED
from brim.recipe import Recipe
from brim.training.batches import Batch
from brim.training.masking import Masking
from brim.training.packing import pack
from brim.training.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """All examples, tokenized."""

    input_ids: Tensor
    """RT, or RS for sequence-to-sequence."""
    labels: Tensor
    """RT; R for classification."""
    attention_mask: Tensor | None = None
    """As `input_ids`; None where no row is padded."""
    position_ids: Tensor | None = None
    """As `input_ids`; None where a row is one example, or a piece of one text."""
    masking: Masking | None = None
    """Chooses other targets for each step; masked-lm only, whose `labels` are the tokens themselves."""
    classes: tuple[str, ...] = ()
    """Names of the labels 0, 1, ...; classification only."""
    padding_id: int | None = None
    """The token that fills rows up, where some are."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def step_batches(self, recipe: Recipe, step: int, *, data_rank: int = 0) -> list[Batch]:
        """The micro-batches of optimizer step `step` (from 0) that are this rank's: a function of the recipe and the
        step alone. Ranks take turns, so that all together read the rows that one would read in as many micro-batches.
        """
        size, ranks = recipe.micro_batch_size, recipe.parallel.data_ranks
        first = step * recipe.rows_per_step
        order = self.step_rows(recipe, step)
        generator = torch.Generator().manual_seed(recipe.training.seed * 1_000_003 + first)
        batches = [self._batch(order[start : start + size], generator) for start in range(0, len(order), size)]
        turns = [batches[start : start + ranks] for start in range(0, len(batches), ranks)]
        return [replace(turn[data_rank], num_targets=sum(batch.num_targets for batch in turn)) for turn in turns]

    def step_rows(self, recipe: Recipe, step: int) -> list[int]:
        """Which rows of the data set (from 0) optimizer step `step` reads, on all ranks."""
        return self._order(recipe.training.seed, step * recipe.rows_per_step, recipe.rows_per_step)

    def steps(self, recipe: Recipe) -> int:
        """Optimizer steps of the run: `max_steps`, else enough to see each row once an epoch."""
        return recipe.training.max_steps or -(-recipe.training.epochs * len(self) // recipe.rows_per_step)

    def in_order(self, size: int) -> Iterator[Batch]:
        """Each row once, as in the file, `size` at a time, masked the same way each time; the last may be smaller."""
        generator = torch.Generator().manual_seed(0)
        for start in range(0, len(self), size):
            yield self._batch(list(range(start, min(start + size, len(self)))), generator)

    @property
    def fingerprint(self) -> str:
        """The same for the same examples; another for any others."""
        digest = hashlib.sha256()
        positions = () if self.position_ids is None else (self.position_ids,)
        for tensor in (self.input_ids, self.labels, *positions):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def _order(self, seed: int, first: int, count: int) -> list[int]:
        """Rows number first..first+count of an endless walk that shuffles anew each epoch."""
        chosen: list[int] = []
        while len(chosen) < count:
            epoch, start = divmod(first + len(chosen), len(self))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            shuffled = torch.randperm(len(self), generator=generator).tolist()
            chosen += shuffled[start : start + count - len(chosen)]
        return chosen

    def _batch(self, rows: list[int], generator: torch.Generator) -> Batch:
        input_ids, labels = self.input_ids[rows], self.labels[rows]
        if self.masking is not None:
            input_ids, labels = self.masking(input_ids, generator)
        return Batch(
            input_ids=input_ids,
            labels=labels,
            attention_mask=None if self.attention_mask is None else self.attention_mask[rows],
            position_ids=None if self.position_ids is None else self.position_ids[rows],
            num_targets=int((labels != IGNORED).sum()),
        )


def tokenize(rows: Sequence[Row], tokenizer: Any, recipe: Recipe) -> DataSet:
    """The rows in the recipe's shape. Raises DataError when there is nothing to predict."""
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
    texts = tokenizer([row.text for row in rows], verbose=False)["input_ids"]
    examples = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in texts]
    examples = [ids for ids in examples if len(ids) > 1]
    if not examples:
        raise DataError("no example of the data has two tokens: there is no next token to learn")
    inputs, labels, positions = pack(examples, recipe.seq_len, padding=end if end is not None else 0)
    return DataSet(input_ids=inputs, labels=labels, position_ids=positions)


def _blocks(rows: Sequence[Row], tokenizer: Any, recipe: Recipe) -> DataSet:
    """Each label is the token after its input token; the last block is filled up with tokens that have no label."""
    end = tokenizer.eos_token_id
    stream: list[int] = []
    # With the tokenizer's own marks (some models know texts only behind a start token), as at inference.
    # Not verbose: rows longer than the model's positions are cut into blocks, there is nothing to warn of.
    for ids in tokenizer([row.text for row in rows], verbose=False)["input_ids"]:
        stream += ids if end is None or ids[-1:] == [end] else [*ids, end]
    if len(stream) < 2:
        raise DataError("the data is one token long: there is no next token to learn")
    length = recipe.seq_len
    missing = -(len(stream) - 1) % length
    padding = end if end is not None else 0
    inputs = torch.tensor(stream[:-1] + [padding] * missing).view(-1, length)
    labels = torch.tensor(stream[1:] + [IGNORED] * missing).view(-1, length)
    return DataSet(input_ids=inputs, labels=labels)


def _masked_blocks(rows: Sequence[Row], tokenizer: Any, recipe: Recipe) -> DataSet:
    """Rows with the tokenizer's marks around each, cut into blocks; no block holds padding."""
    masking = Masking.of(tokenizer)
    stream = [token for ids in tokenizer([row.text for row in rows])["input_ids"] for token in ids]
    if masking.special_ids.issuperset(stream):
        raise DataError("the data has no token that could be masked")
    missing = -len(stream) % recipe.seq_len
    rounds = -(-missing // len(stream))
    blocks = torch.tensor(stream + (stream * rounds)[:missing]).view(-1, recipe.seq_len)
    return DataSet(input_ids=blocks, labels=blocks, masking=masking)


def _labelled(rows: Sequence[Row], tokenizer: Any, recipe: Recipe) -> DataSet:
    names = [row.label for row in rows if row.label is not None]
    if len(names) < len(rows):
        raise DataError('classification data needs a "label" beside the "text" in each row')
    classes = _classes(names, recipe.num_labels)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise DataError("the tokenizer has neither a padding nor an end token to fill rows up with")
    texts = tokenizer(
        [row.text for row in rows],
        max_length=recipe.seq_len,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    return DataSet(
        input_ids=texts["input_ids"],
        labels=torch.tensor([classes.index(name) for name in names]),
        attention_mask=texts["attention_mask"],
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
    if any(not row.source for row in rows):
        raise DataError("sequence-to-sequence data needs a source and a target in each row; this is plain text")
    sources = tokenizer([row.source for row in rows], max_length=recipe.seq_len, truncation=True)["input_ids"]
    targets = tokenizer(text_target=[row.target for row in rows], max_length=recipe.target_len, truncation=True)
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id or 0
    labels = [_ended(ids, end, recipe.target_len) for ids in targets["input_ids"]]
    return DataSet(
        input_ids=_filled(sources, recipe.seq_len, padding),
        labels=_filled(labels, recipe.target_len, IGNORED),
        attention_mask=_filled([[1] * len(ids) for ids in sources], recipe.seq_len, 0),
    )


def _ended(ids: list[int], end: int | None, length: int) -> list[int]:
    """With the end token last, which is how the model learns to stop; a target that was cut has it, too."""
    return ids if end is None or ids[-1:] == [end] else [*ids[: length - 1], end]


def _filled(rows: list[list[int]], length: int, filling: int) -> Tensor:
    return torch.tensor([row + [filling] * (length - len(row)) for row in rows])
