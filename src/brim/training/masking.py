"""Masked-token targets: which tokens a masked-lm model is to fill in, as BERT chose them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brim.errors import DataError
from brim.layers.chunked_loss import IGNORED

_SHARE = 0.15
_SHARE_HIDDEN, _SHARE_RANDOM = 0.8, 0.1
"""Of the chosen tokens: shown as the mask token, shown as a random one; the rest is shown as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Masking:
    """How to hide tokens of a tokenizer's."""

    mask_id: int
    special_ids: frozenset[int]
    """Never chosen."""
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: Any) -> "Masking":
        if tokenizer.mask_token_id is None:
            raise DataError("the tokenizer has no mask token, so masked-lm cannot be trained with it")
        return cls(
            mask_id=tokenizer.mask_token_id,
            special_ids=frozenset(tokenizer.all_special_ids),
            vocab_size=len(tokenizer),
        )

    def __call__(self, input_ids_BT: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the model sees, and the tokens it is to find: 15 % of each row, at least one; -100 elsewhere."""
        special_BT = torch.isin(input_ids_BT, torch.tensor(sorted(self.special_ids)))
        draw_BT = torch.rand(input_ids_BT.shape, generator=generator).masked_fill(special_BT, 2.0)
        count = max(1, round(_SHARE * input_ids_BT.shape[1]))
        # the same number in each row: no row is without a target
        chosen_BT = torch.zeros_like(special_BT).scatter(1, draw_BT.topk(count, largest=False).indices, True)
        chosen_BT &= ~special_BT
        labels_BT = input_ids_BT.masked_fill(~chosen_BT, IGNORED)
        fate_BT = torch.rand(input_ids_BT.shape, generator=generator)
        random_BT = torch.randint(self.vocab_size, input_ids_BT.shape, generator=generator)
        seen_BT = input_ids_BT.masked_fill(chosen_BT & (fate_BT < _SHARE_HIDDEN), self.mask_id)
        is_random_BT = chosen_BT & (fate_BT >= 1 - _SHARE_RANDOM)
        return torch.where(is_random_BT, random_BT, seen_BT), labels_BT
