"""The norm of all gradients, also where some are spread over other ranks than others, and clipping to it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from brim.training.parts import spread_of


def clip(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to this norm; returns what it was, the same on all ranks."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = _joined([_whole(get_total_norm(group)) for group in _by_spread(gradients)])
    for group in _by_spread(parameters):
        clip_grads_with_norm_(group, max_norm, norm)
    return norm


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients, in FP32 (an FP16 one passes 65504); each is made FP32 by itself."""
    return _joined([
        _whole(_joined([torch.linalg.vector_norm(gradient.float()) for gradient in group]))
        for group in _by_spread(gradients)
    ])  # fmt: skip


def _joined(norms: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(list(norms))) if len(norms) > 1 else norms[0]


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _by_spread(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """No operator takes tensors that are spread over different ranks."""
    groups: dict[DeviceMesh | None, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(spread_of(tensor), []).append(tensor)
    return list(groups.values())
