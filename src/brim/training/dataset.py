"""All examples in the recipe's shape, and the order in which steps read them: the seed's, whatever the ranks.

Shapes: R rows of the data set, T tokens of a row (S of a source row).
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from brim.layers.chunked_loss import IGNORED
from brim.layers.soft_labels import SoftLabels
from brim.recipe import Recipe
from brim.training.batches import Batch
from brim.training.masking import Masking


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Of what the data file has, before it is put into rows."""

    examples: int
    tokens: int
    learned: int
    """Tokens that have a label in an epoch."""
    longest: int
    """Tokens of the longest example; of sequence-to-sequence, of the longest source."""
    cut: int
    """Examples that are longer than a row of the recipe; of sequence-to-sequence, or whose target is."""

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Origins:
    """Which examples of the file are in each row of a data set."""

    places: tuple[str, ...]
    """File and line of each example."""
    examples: tuple[tuple[int, ...], ...]
    """Of each row."""


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
    origins: Origins | None = None
    """Where each row comes from; None where that is not known."""
    counts: Counts | None = None
    soft: SoftLabels | None = None
    """What a teacher says of each position, (R, T, K)."""

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

    def places_of(self, rows: Iterable[int]) -> list[str]:
        """File and line of each example that these rows are of, once and in order; [] where that is not known."""
        if self.origins is None:
            return []
        found = sorted({example for row in rows for example in self.origins.examples[row]})
        return list(dict.fromkeys(self.origins.places[example] for example in found))

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
            soft=None if self.soft is None else self.soft.mapped(lambda tensor: tensor[rows]),
            num_targets=int((labels != IGNORED).sum()),
        )
