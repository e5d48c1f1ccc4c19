"""Modules of a model -> packed ones, and random weights in them. Shapes: R outputs, K inputs, V rows, H hidden size."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from brim.layers.experts import are_packable
from brim.layers.packed_embedding import PackedEmbedding
from brim.layers.packed_experts import PackedExperts
from brim.layers.packed_linear import PackedLinear
from brim.layers.packing import Packing

_STD = 0.02


def packed_module(module: Any, *, packing: Packing, compute: torch.dtype) -> nn.Module:
    """In the place of a linear layer or of experts, on the same device, without a weight yet."""
    if are_packable(module):
        experts, hidden, intermediate = module.down_proj.shape
        return PackedExperts(
            num_experts=experts, hidden=hidden, intermediate=intermediate, act_fn=module.act_fn,
            packing=packing, compute=compute, device=module.down_proj.device,
        )  # fmt: skip
    assert isinstance(module, nn.Linear | Conv1D)
    transposed = isinstance(module, Conv1D)
    rows, inputs = reversed(module.weight.shape) if transposed else module.weight.shape
    return PackedLinear(
        inputs, rows, bias=module.bias, packing=packing, compute=compute, device=module.weight.device,
        transposed=transposed,
    )  # fmt: skip


def fill(model: PreTrainedModel) -> None:
    """Random weights in all packed modules; transformers' initializers, which want floats, keep away from them."""
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.fill(std=_STD)
        elif isinstance(module, PackedLinear | PackedEmbedding):
            module.pack(torch.empty(module.out_features, module.in_features, dtype=module.compute).normal_(std=_STD))
            module.weight._is_hf_initialized = True  # type: ignore[union-attr]
        else:
            continue
        module._is_hf_initialized = True
        if isinstance(module, PackedLinear) and module.bias is not None:
            nn.init.zeros_(module.bias)
