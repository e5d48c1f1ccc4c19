"""Rows of text -> micro-batches of the recipe's exact shape, in an order that the seed decides.

Causal: rows are joined with an end token between them and cut into blocks, so no token is padding (but for the end of
the last block). Sequence-to-sequence: each row is cut or padded to the recipe's lengths.

Shapes: R rows of the data set, T tokens of a row (S of a source row).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brim.errors import DataError
from brim.layers.chunked_loss import IGNORED
from brim.recipe import Recipe
from brim.training.batches import Batch
from brim.training.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """All examples, tokenized."""

    input_ids: Tensor
    """RT, or RS for sequence-to-sequence."""
    labels: Tensor
    """RT."""
    attention_mask: Tensor | None
    """RS; sequence-to-sequence only."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def step_batches(self, recipe: Recipe, step: int) -> list[Batch]:
        """The micro-batches of optimizer step `step` (from 0): a function of the recipe and the step alone."""
        size = recipe.micro_batch_size
        first = step * size * recipe.grad_accumulation
        order = self._order(recipe.training.seed, first, size * recipe.grad_accumulation)
        return [self._batch(order[start : start + size]) for start in range(0, len(order), size)]

    def steps(self, recipe: Recipe) -> int:
        """Optimizer steps of the run: `max_steps`, else enough to see each row once an epoch."""
        per_step = recipe.micro_batch_size * recipe.grad_accumulation
        return recipe.training.max_steps or -(-recipe.training.epochs * len(self) // per_step)

    def in_order(self, size: int) -> Iterator[Batch]:
        """Each row once, as in the file, `size` at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self._batch(list(range(start, min(start + size, len(self)))))

    @property
    def num_targets(self) -> int:
        """Labels that are not -100."""
        return int((self.labels != IGNORED).sum())

    @property
    def fingerprint(self) -> str:
        """The same for the same examples; another for any others."""
        digest = hashlib.sha256()
        for tensor in (self.input_ids, self.labels):
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

    def _batch(self, rows: list[int]) -> Batch:
        labels = self.labels[rows]
        return Batch(
            input_ids=self.input_ids[rows],
            labels=labels,
            attention_mask=None if self.attention_mask is None else self.attention_mask[rows],
            num_targets=int((labels != IGNORED).sum()),
        )


def tokenize(rows: Sequence[Row], tokenizer: Any, recipe: Recipe) -> DataSet:
    """The rows in the recipe's shape. Raises DataError when there is nothing to predict."""
    if recipe.task == "seq2seq-lm":
        return _pairs(rows, tokenizer, recipe)
    return _blocks(rows, tokenizer, recipe)


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
    return DataSet(input_ids=inputs, labels=labels, attention_mask=None)


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
