"""Attention as other libraries write it around the same kernel: other tensors live, and not as long.

In place: unsloth's kernel turns queries and keys where the products wrote them, and their gradients in backward;
transformers makes new ones, by way of three more.
Repeated: Mistral's and Mixtral's FlashAttention of transformers to 4.47 (modeling_mistral.py, MistralFlashAttention2)
reads keys and values once for each query head, names of its frame, so that they live until the output's product is
done, and in backward.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from brim.layers import fused

_PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj")
_ROTARY = "apply_rotary_pos_emb"
_ATTENTION = "scaled_dot_product_attention"


def alter_attention(model: nn.Module, *, in_place: bool, repeated: bool) -> None:
    """Every attention with a product each for queries, keys and values; others stay as they are."""
    for module in model.modules():
        if all(hasattr(module, product) for product in _PRODUCTS):
            module.forward = _altered(module, in_place=in_place, repeated=repeated)


def multiply_angles(model: nn.Module) -> None:
    """Begin each rotary embedding with transformers 4's product (modeling_llama.py, LlamaRotaryEmbedding, 4.57): on a
    GPU it has cuBLAS take its workspace before the first block makes room for its own."""
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding") and isinstance(getattr(module, "inv_freq", None), Tensor):
            module.register_forward_pre_hook(_multiply)


def _multiply(module: nn.Module, given: tuple[Any, ...]) -> None:
    frequencies: Any = module.inv_freq
    positions = torch.ones(1, 1, given[0].shape[-2], device=given[0].device)
    with torch.no_grad(), torch.autocast(given[0].device.type, enabled=False):
        torch.matmul(frequencies[None, :, None].float(), positions)


def _altered(module: nn.Module, *, in_place: bool, repeated: bool) -> Callable[..., Any]:
    forward, family = module.forward, sys.modules[type(module).__module__]

    @wraps(forward)
    def altered(*given: Any, **named: Any) -> Any:
        held: list[Tensor] = []
        with ExitStack() as stack:
            if in_place and hasattr(family, _ROTARY):
                stack.enter_context(mock.patch.object(family, _ROTARY, _turned))
            if repeated:
                kernel = getattr(torch.nn.functional, _ATTENTION)
                stack.enter_context(mock.patch.object(torch.nn.functional, _ATTENTION, _repeating(kernel, held)))
            return forward(*given, **named)

    return altered


def _turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Turn.apply(query, cos, sin), _Turn.apply(key, cos, sin)  # type: ignore[no-untyped-call]


class _Turn(torch.autograd.Function):
    """Nobody asks for what the products gave, so writing over it harms no one."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.cos, ctx.sin = cos, sin
        fused.turn(states, cos, sin)
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        fused.turn(gradients[0], ctx.cos, -ctx.sin)
        return gradients[0], None, None


def _repeating(kernel: Callable[..., Tensor], held: list[Tensor]) -> Callable[..., Tensor]:
    def attention(
        query: Tensor, key: Tensor, value: Tensor, *given: Any, enable_gqa: bool = False, **named: Any
    ) -> Any:
        if (times := query.shape[1] // key.shape[1]) > 1:
            key, value = (states.repeat_interleave(times, dim=1) for states in (key, value))
            held.extend((key.detach(), value.detach()))
        return kernel(query, key, value, *given, **named)

    return attention
