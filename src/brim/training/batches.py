"""A micro-batch: tensors of fixed shape, so that every step takes the memory that was predicted."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brim.layers.chunked_loss import IGNORED
from brim.layers.soft_labels import SoftLabels
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.training.packing import halves


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows that go through the model at once. Shapes: B rows, T tokens of a row (S of a source row)."""

    input_ids: Tensor
    """BT. Sequence-to-sequence: BS, the source."""
    labels: Tensor
    """BT: the token that each position is to predict; -100 where there is nothing to learn. Classification: B."""
    attention_mask: Tensor | None = None
    """1 for tokens and 0 for padding, as `input_ids`; None where no row is padded."""
    position_ids: Tensor | None = None
    """BT, counted anew in each example; None where a row is one."""
    soft: SoftLabels | None = None
    """What a teacher says of each position, (B, T, K); None without one."""
    num_targets: int
    """Labels that are not -100, those of the other ranks' rows that are read at the same time included."""

    def mapped(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with each tensor replaced by what `move` makes of it."""
        mask, positions = self.attention_mask, self.position_ids
        return replace(
            self,
            input_ids=move(self.input_ids),
            labels=move(self.labels),
            attention_mask=None if mask is None else move(mask),
            position_ids=None if positions is None else move(positions),
            soft=None if self.soft is None else self.soft.mapped(move),
        )


def synthetic_batch(recipe: Recipe, spec: ModelSpec, *, seed: int = 0) -> Batch:
    """Random tokens in the recipe's shape; where real data is padded, one row has one token of padding.

    Packed rows hold two examples each: their number does not matter to memory.
    """
    generator, ranks = torch.Generator().manual_seed(seed), recipe.parallel.data_ranks

    def tokens(length: int) -> Tensor:
        return torch.randint(0, spec.vocab_size, (recipe.micro_batch_size, length), generator=generator)

    if recipe.task in ("causal-lm", "masked-lm"):
        labels = tokens(recipe.seq_len)
        positions = halves(recipe.micro_batch_size, recipe.seq_len) if recipe.training.packing else None
        return Batch(
            input_ids=tokens(recipe.seq_len),
            labels=labels,
            position_ids=positions,
            soft=_synthetic_teacher(labels, recipe.qat.teacher_top) if recipe.has_teacher else None,
            num_targets=labels.numel() * ranks,
        )
    mask = torch.ones(recipe.micro_batch_size, recipe.seq_len, dtype=torch.long)
    mask[0, -1] = 0
    if recipe.task == "sequence-classification":
        labels = torch.randint(0, recipe.num_labels, (recipe.micro_batch_size,), generator=generator)
        num_targets = len(labels)
    else:
        labels = tokens(recipe.target_len)
        labels[0, -1] = IGNORED
        num_targets = labels.numel() - 1
    return Batch(input_ids=tokens(recipe.seq_len), labels=labels, attention_mask=mask, num_targets=num_targets * ranks)


def _synthetic_teacher(labels_BT: Tensor, count: int) -> SoftLabels:
    """Of every position the same."""
    ids = torch.arange(count, dtype=torch.int32).expand(*labels_BT.shape, count).contiguous()
    return SoftLabels(ids, torch.full(ids.shape, 1 / count, dtype=torch.bfloat16))
