"""Activation checkpointing: blocks keep their input, or also their matmuls' results, and run again in backward.

Selective keeps what linears (and experts' grouped matmuls) give: by far the most of a block's work, in tensors of a
token's width. All else is cheap and recomputed: norms, activations, and attention, whose batched products over scores
are not kept since those grow with the square of the length.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

_KEPT = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._grouped_mm.default})


def checkpoint_blocks(base: PreTrainedModel, kind: Literal["none", "selective", "full"]) -> None:
    """Make the model's blocks run again in backward. Non-reentrant: frozen inputs (LoRA) need no hook, and only what
    is used again is kept."""
    if kind == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    base.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)


def _policy(_: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
