"""Cross-entropy of an output head, chunk by chunk, so that all logits never exist at once.

Each chunk's logits and their gradient are made, used for the gradients of the hidden states and of the head, and
dropped in forward already; backward only hands on what forward found. Peak: one chunk's logits instead of
tokens x vocabulary x (4 to 14) bytes. No recomputation: the head costs the three matmuls it always costs.

How this differs from fused kernels (Liger, CCE): plain torch operators, so it is the same on fake tensors, CPU and
GPU; and the head's gradient is added to `weight.grad` at once, chunk by chunk, so that no second gradient of the size
of the vocabulary exists beside it. Trade-off: the loss must be the root of backward, scaled beforehand.

Shapes: N tokens, C tokens of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brim.layers.soft_labels import IGNORED as IGNORED
from brim.layers.soft_labels import SoftLabels, cross_entropy

Finish = Callable[[Tensor], Tensor]
"""What a model does to its logits after the head (softcap, scale), elementwise."""

Target = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""FP32 logits, which it may write over -> their loss, and its gradient by them."""

_CHUNK_BYTES = 32 * 2**20
"""FP32 logits of one chunk: large enough for efficient matmuls, small beside any model."""

_ROWS_AT_ONCE = 4096
"""Rows of the head whose low-precision product exists beside an FP32 gradient."""


def chunk_tokens(vocab_size: int) -> int:
    """Tokens per chunk: FP32 logits of about 32 MiB, at least 16 tokens."""
    return max(16, _CHUNK_BYTES // (4 * vocab_size))


def chunked_cross_entropy(
    hidden_NH: Tensor,
    head: nn.Linear,
    labels_N: Tensor,
    *,
    scale: float,
    finish: Finish,
    soft: SoftLabels | None = None,
    share: float = 0.0,
) -> Tensor:
    """`scale` times the summed cross-entropy over labels that are not -100, as an FP32 scalar.

    `soft`: a teacher's labels, which have this `share` of the target.

    With gradients enabled, the head's trainable parameters have their gradients added to `.grad` when this returns;
    those of the hidden states flow when `backward` is called on the scalar itself.
    """
    learns = torch.is_grad_enabled()
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH, head, labels_N, scale, finish, learns, soft, share
    )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_NH: Tensor,
        head: nn.Linear,
        labels_N: Tensor,
        scale: float,
        finish: Finish,
        learns: bool,
        soft: SoftLabels | None,
        share: float,
    ) -> Tensor:
        device = hidden_NH.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_NH.dtype
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        grad_NH = torch.empty_like(hidden_NH) if learns else None
        size = chunk_tokens(head.out_features)
        with torch.autocast(device, enabled=False):
            weight_VH = head.weight.detach().to(dtype)
            for start in range(0, len(hidden_NH), size):
                rows = slice(start, min(start + size, len(hidden_NH)))
                _add_chunk(hidden_NH, grad_NH, labels_N, soft, rows, weight_VH, head, finish, scale, share, total)
        if grad_NH is not None:
            ctx.save_for_backward(grad_NH)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NH,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_NH, None, None, None, None, None, None, None


def _add_chunk(
    hidden_NH: Tensor,
    grad_NH: Tensor | None,
    labels_N: Tensor,
    soft: SoftLabels | None,
    rows: slice,
    weight_VH: Tensor,
    head: nn.Linear,
    finish: Finish,
    scale: float,
    share: float,
    total: Tensor,
) -> None:
    """Add the loss of these rows to `total`; into `grad_NH` their gradient by the hidden states (None: none learns)."""
    hidden_CH, learns = hidden_NH[rows].to(weight_VH.dtype), grad_NH is not None
    said = None if soft is None else soft.mapped(lambda tensor: tensor[rows])
    target = _target(labels_N[rows], said, share, scale, learns)
    loss, grad_CV = _loss_and_gradient(hidden_CH, weight_VH, head.bias, target, finish, learns)
    total += loss
    if grad_NH is not None and grad_CV is not None:
        grad_NH[rows] = grad_CV @ weight_VH
        _add_head_gradient(head, grad_CV, hidden_CH)


def _loss_and_gradient(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target: Target,
    finish: Finish,
    learns: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss of a chunk, and its gradient by the head's raw logits in the matmul's dtype."""
    raw_CV = F.linear(hidden_CH, weight_VH, None if bias_V is None else bias_V.detach().to(weight_VH.dtype))
    with torch.set_grad_enabled(learns):
        finished_CV = finish(raw_CV.requires_grad_(learns))
    is_raw = finished_CV is raw_CV
    # a gradient is written over the logits: not over what a finish keeps for its own backward
    loss, grad_CV = target(finished_CV.detach().to(torch.float32, copy=learns and not is_raw))
    if grad_CV is None:
        return loss, None
    grad_CV = grad_CV.to(raw_CV.dtype)
    return loss, grad_CV if is_raw else torch.autograd.grad(finished_CV, raw_CV, grad_CV)[0]


def _target(labels_C: Tensor, soft: SoftLabels | None, share: float, scale: float, learns: bool) -> Target:
    if soft is None and learns:
        return partial(_softmax_loss, labels_C=labels_C, scale=scale)
    return partial(_traced_loss, labels_C=labels_C, soft=soft, share=share, scale=scale, learns=learns)


def _softmax_loss(logits_CV: Tensor, *, labels_C: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`scale` times the summed cross-entropy, and its gradient written over the logits.

    As autograd's, but for one FP32 tensor of the logits' size where that has three.
    """
    weights_C1 = (labels_C != IGNORED).to(torch.float32).mul_(scale)[:, None]
    chosen_C1 = labels_C.clamp(min=0)[:, None]
    logits_CV -= logits_CV.amax(-1, keepdim=True)
    picked_C1 = logits_CV.gather(-1, chosen_C1)
    total_C1 = logits_CV.exp_().sum(-1, keepdim=True)
    loss = ((total_C1.log() - picked_C1) * weights_C1).sum()
    logits_CV *= weights_C1 / total_C1
    return loss, logits_CV.scatter_add_(-1, chosen_C1, -weights_C1)


def _traced_loss(
    logits_CV: Tensor, *, labels_C: Tensor, soft: SoftLabels | None, share: float, scale: float, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """The same by autograd, with a teacher; or without a gradient."""
    with torch.set_grad_enabled(learns):
        loss = cross_entropy(logits_CV.requires_grad_(learns), labels_C, soft, share) * scale
    return loss.detach(), torch.autograd.grad(loss, logits_CV)[0] if learns else None


def _add_head_gradient(head: nn.Linear, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    if head.weight.requires_grad:
        grad_VH = _gradient_of(head.weight)
        if grad_VH.dtype == hidden_CH.dtype:
            grad_VH.addmm_(grad_CV.T, hidden_CH)
        else:
            for rows in range(0, head.out_features, _ROWS_AT_ONCE):
                part = slice(rows, rows + _ROWS_AT_ONCE)
                grad_VH[part] += (grad_CV[:, part].T @ hidden_CH).to(grad_VH.dtype)
    if head.bias is not None and head.bias.requires_grad:
        grad_V = _gradient_of(head.bias)
        grad_V += grad_CV.sum(dim=0, dtype=grad_V.dtype)


def _gradient_of(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
