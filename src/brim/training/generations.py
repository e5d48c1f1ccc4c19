"""Losses as other libraries compute them, so that a run of theirs is rehearsed as it was run.

Same loss value (theirs leave the last position of a row without a label), other memory. Shapes: B rows, T tokens,
V vocabulary, H hidden size.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from brim.layers.chunked_loss import IGNORED
from brim.layers.one_kernel import one_kernel

Inputs = dict[str, Tensor]
Loss = Callable[..., Tensor]


def generation_loss(
    name: str,
    base: PreTrainedModel,
    model: nn.Module,
    inputs: Inputs,
    labels_BT: Tensor,
    *,
    kind: str,
    widened: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Summed cross-entropy by the named library, and what its users keep alive through backward (or None).

    transformers-16bit: logits copied for the shift and never upcast (modeling_gpt2.py, modeling_gpt_bigcode.py, 4.x).
    transformers-4.40: logits rebound to FP32, copied for the shift (modeling_mistral.py to 4.45; modeling_granite.py).
    Both in the model's own forward, while what it gave its head has a name.
    transformers-4.46: the same, while the caller holds the 16-bit ones (loss/loss_utils.py, ForCausalLMLoss, to 4.49).
    transformers-4.50 (and later): labels are shifted instead.
    held: transformers-4.50, with the model's output bound to a name while backward runs.

    `kind` of cross-entropy: operators; in-place, a kernel that keeps the logits alone and writes their gradient over
    them (unsloth, fms-acceleration); or fused, the same beside them (torch.compile). `widened`: logits are returned in
    FP32 (accelerate's convert_outputs_to_fp32), while the model's own live.
    """
    cross_entropy = _CROSS_ENTROPIES[kind]
    if name in ("transformers-16bit", "transformers-4.40"):
        given: list[Tensor] = []
        hook = base.get_output_embeddings().register_forward_pre_hook(lambda _, tensors: given.extend(tensors))
        logits_BTV = model(**inputs).logits
        hook.remove()
        if name == "transformers-4.40":
            logits_BTV = logits_BTV.float()
        total = _shifted_logits(logits_BTV, labels_BT, cross_entropy).float()
        if widened:
            logits_BTV.float()
        return total, None

    def loss_function(logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
        if name == "transformers-4.46":
            return _shifted_logits(logits.float(), labels, cross_entropy)
        return cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    previous = base.loss_function
    base.loss_function = loss_function
    try:
        output = model(**inputs, labels=labels_BT)
    finally:
        base.loss_function = previous
    if widened:
        output.logits.float()
    return output.loss, output.logits if name == "held" else None


_CHUNK_TOKENS = 128


def litgpt_logits(hidden_BTH: Tensor, head: nn.Module, *, whole: bool) -> list[Tensor]:
    """litgpt@26857050, finetune/lora.py: chunk by chunk; `whole`: at once (finetune/full.py). The last position is cut.

    Fabric turns what a model returns into FP32 (lightning 2.3, plugins/precision/half.py, convert_output).
    """
    logits = [head(hidden) for hidden in hidden_BTH.split(hidden_BTH.shape[1] if whole else _CHUNK_TOKENS, dim=1)]
    logits = [part.float() for part in logits]
    if not whole:
        logits[-1] = logits[-1][..., :-1, :]
    return logits


def litgpt_loss(logits: list[Tensor], labels_BT: Tensor, *, whole: bool) -> Tensor:
    """litgpt@26857050, utils.py, chunked_cross_entropy: 128 tokens at a time."""
    labels_BT = labels_BT[..., :-1]
    if whole:
        parts_NV = logits[0][..., :-1, :].flatten(0, 1).split(_CHUNK_TOKENS)
        labels = labels_BT.flatten().split(_CHUNK_TOKENS)
    else:
        parts_NV = tuple(part.flatten(0, 1) for part in logits)
        labels = tuple(part.flatten() for part in labels_BT.split(_CHUNK_TOKENS, dim=1))
    losses = [
        F.cross_entropy(part, targets, ignore_index=IGNORED, reduction="none")
        for part, targets in zip(parts_NV, labels, strict=False)
    ]
    return torch.cat(losses).sum()


def torchtune_loss(hidden_BTH: Tensor, head: nn.Linear, labels_BT: Tensor, kind: str, num_chunks: int = 8) -> Tensor:
    """torchtune 0.5, modules/loss/ce_chunked_output_loss.py: logits of eight chunks stay, each is upcast in its own
    cross-entropy."""
    chunks = [head(hidden_BCH) for hidden_BCH in hidden_BTH.chunk(num_chunks, dim=1)]
    labels = labels_BT.chunk(num_chunks, dim=1)
    total = hidden_BTH.new_zeros((), dtype=torch.float32)
    for logits_BCV, labels_BC in zip(chunks, labels, strict=True):
        # compiled, the upcast is inside the kernel
        logits_NV = (logits_BCV if kind == "fused" else logits_BCV.float()).flatten(0, 1)
        total = total + _CROSS_ENTROPIES[kind](logits_NV, labels_BC.flatten()).float()
    return total


def _shifted_logits(logits_BTV: Tensor, labels_BT: Tensor, cross_entropy: Loss) -> Tensor:
    # `logits[..., :-1, :]` as PyTorch of those days reads it: a slice of the whole vocabulary is an operator, too; its
    # gradient is copied (2.4, aten/src/ATen/TensorIndexing.h, applySlice: only a stop at the very length is none)
    tokens_BTV = torch.ops.aten.slice.Tensor(logits_BTV, 1, 0, -1)
    shifted_BTV = torch.ops.aten.slice.Tensor(tokens_BTV, 2, 0, sys.maxsize).contiguous()
    return cross_entropy(shifted_BTV.flatten(0, 1), labels_BT[..., :-1].flatten())


def _cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")


class _FastCrossEntropy(torch.autograd.Function):
    """Keeps the logits and a log-sum-exp; backward turns the logits into their gradient, in place or in a copy."""

    @staticmethod
    @one_kernel
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, writes_over: bool) -> Tensor:
        ctx.writes_over = writes_over
        lse_N = torch.logsumexp(logits_NV, dim=-1)
        known_N = labels_N != IGNORED
        chosen_N = logits_NV.gather(1, labels_N.clamp(min=0)[:, None])[:, 0]
        ctx.save_for_backward(logits_NV, lse_N, labels_N)
        return ((lse_N - chosen_N) * known_N).sum()

    @staticmethod
    @one_kernel
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, lse_N, labels_N = ctx.saved_tensors
        # written over: nobody reads the logits again
        logits_NV = logits_NV.detach().sub_(lse_N[:, None]) if ctx.writes_over else logits_NV - lse_N[:, None]
        logits_NV.exp_()
        logits_NV.scatter_add_(1, labels_N.clamp(min=0)[:, None], -torch.ones_like(lse_N)[:, None])
        return logits_NV.mul_((gradients[0] * (labels_N != IGNORED))[:, None]), None, None


def _in_place(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    loss: Tensor = _FastCrossEntropy.apply(logits_NV, labels_N, True)  # type: ignore[no-untyped-call]
    return loss


def _fused(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    loss: Tensor = _FastCrossEntropy.apply(logits_NV, labels_N, False)  # type: ignore[no-untyped-call]
    return loss


_CROSS_ENTROPIES: dict[str, Loss] = {"operators": _cross_entropy, "in-place": _in_place, "fused": _fused}
