"""Cross-entropy against a mixture of the text's next token and a teacher's distribution over its likeliest few.

    target = (1 - share) onehot(label) + share teacher;   loss = logsumexp(z) - sum_v target_v z_v

The teacher's probabilities are of its K likeliest tokens and sum to one, so that the gradient by z is softmax(z) -
target, as ever. A token without a label has no loss.

Shapes: N tokens (any number of dimensions before), K tokens of the teacher, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""Label of a token without loss, as in PyTorch's cross_entropy."""


class SoftLabels(NamedTuple):
    """What a teacher says of each token."""

    ids_NK: Tensor
    """int32, its likeliest tokens."""
    probabilities_NK: Tensor
    """BF16; each token's sum to one but for their rounding."""

    def mapped(self, move: Callable[[Tensor], Tensor]) -> "SoftLabels":
        return SoftLabels(move(self.ids_NK), move(self.probabilities_NK))


def soft_labels(logits_NV: Tensor, count: int) -> SoftLabels:
    """Of a teacher's logits."""
    values, ids = logits_NV.float().topk(count, dim=-1)
    return SoftLabels(ids.to(torch.int32), values.softmax(-1).to(torch.bfloat16))


def cross_entropy(logits_NV: Tensor, labels_N: Tensor, soft: SoftLabels | None, share: float) -> Tensor:
    """Summed over the tokens that have a label; without a teacher PyTorch's own."""
    hard = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")
    if soft is None:
        return hard
    named_NK = logits_NV.gather(-1, soft.ids_NK.long())
    nats_N = logits_NV.logsumexp(-1) - (soft.probabilities_NK.float() * named_NK).sum(-1)
    taught = nats_N.masked_fill(labels_N == IGNORED, 0).sum()
    return (1 - share) * hard + share * taught
