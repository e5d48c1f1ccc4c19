"""litgpt's adapters (PyPI litgpt 0.4.0, lora.py): parameters beside a linear layer, one pair for q, k and v together.

Shapes: R rank, K inputs, P parts (of q, k, v) that are adapted.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brim.errors import RecipeError, did_you_mean
from brim.recipe import Lora
from brim.training.litgpt import Attention, Litgpt

_PARTS = ("query", "key", "value")
_TARGETS = (*_PARTS, "projection", "mlp", "head")


class Adapted(nn.Module):
    """A linear layer with an adapter."""

    def __init__(self, linear: nn.Linear, lora: Lora, *, outputs: int, parts: int = 1) -> None:
        super().__init__()
        self.linear = linear
        self.lora_dropout = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
        self.lora_A = nn.Parameter(torch.empty(lora.rank * parts, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(outputs, lora.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = lora.alpha / lora.rank

    def forward(self, x: Tensor) -> Tensor:
        pretrained: Tensor = self.linear(x)
        lora = (self.lora_dropout(x) @ self.lora_A.transpose(0, 1) @ self.lora_B.transpose(0, 1)) * self.scaling
        return pretrained + lora


class AdaptedQKV(Adapted):
    """Of the interleaved product of q, k and v, where not all parts need have an adapter."""

    index: Tensor

    def __init__(self, attention: Attention, lora: Lora, enabled: tuple[bool, bool, bool]) -> None:
        sizes = (attention.heads, attention.groups, attention.groups)
        self.shapes = [
            count * attention.head_dim for count, is_on in zip(sizes, enabled, strict=True) if is_on
        ]  # before there are modules
        super().__init__(_linear(attention.attn), lora, outputs=sum(self.shapes), parts=len(self.shapes))
        self.grouped = attention.groups != attention.heads
        self.all = all(enabled)
        self.register_buffer("index", _places(attention, enabled), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pretrained: Tensor = self.linear(x)
        narrow = F.linear(self.lora_dropout(x), self.lora_A).transpose(-2, -1)
        wide = self._widened(narrow, self.lora_B.unsqueeze(-1)).transpose(-2, -1)
        if not self.all:
            placed = wide.new_zeros(*wide.shape[:-1], pretrained.shape[-1])
            wide = placed.index_copy_(-1, self.index, wide)
        return pretrained + wide * self.scaling

    def _widened(self, narrow: Tensor, weight: Tensor) -> Tensor:
        if not self.grouped:
            return F.conv1d(narrow, weight, groups=len(self.shapes))
        inputs, weights = narrow.chunk(len(self.shapes), dim=1), weight.split(self.shapes)
        return torch.cat([F.conv1d(a, b) for a, b in zip(inputs, weights, strict=True)], dim=1)


def _places(attention: Attention, enabled: tuple[bool, bool, bool]) -> Tensor:
    """Where the adapted parts are among the interleaved outputs."""
    shared = attention.heads // attention.groups
    kinds = [0] * shared + [1, 2]
    chosen = [
        start * attention.head_dim + element
        for kind in range(3)
        if enabled[kind]
        for start in range(attention.groups * (shared + 2))
        if kinds[start % (shared + 2)] == kind
        for element in range(attention.head_dim)
    ]
    return torch.tensor(chosen)


def add_litgpt_lora(model: Litgpt, lora: Lora) -> None:
    """Freeze the model and put adapters beside its linear layers; targets are litgpt's words for them."""
    targets = _TARGETS[:-1] if lora.targets == ("all-linear",) else lora.targets
    for target in targets:
        if target not in _TARGETS:
            raise RecipeError(
                f'lora.targets: library.model = "litgpt" has no {target!r}{did_you_mean(target, _TARGETS)}; '
                f'known: {", ".join(_TARGETS)}, or "all-linear" alone'
            )
    model.requires_grad_(False)
    dtype = model.wte.weight.dtype
    enabled = ("query" in targets, "key" in targets, "value" in targets)
    for block in model.blocks:
        if any(enabled):
            block.attn.attn = _in_format(AdaptedQKV(block.attn, lora, enabled), dtype)
        if "projection" in targets:
            block.attn.proj = _adapted(block.attn.proj, lora, dtype)
        if "mlp" in targets:
            for name in ("fc_1", "fc_2", "proj"):
                if (linear := getattr(block.mlp, name)) is not None:
                    setattr(block.mlp, name, _adapted(linear, lora, dtype))
    if "head" in targets:
        model.lm_head = _adapted(model.lm_head, lora, dtype)


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module


def _adapted(module: nn.Module, lora: Lora, dtype: torch.dtype) -> Adapted:
    linear = _linear(module)
    return _in_format(Adapted(linear, lora, outputs=linear.out_features), dtype)


def _in_format(adapted: Adapted, dtype: torch.dtype) -> Adapted:
    """The adapter alone: what holds a packed weight stays as it is."""
    adapted.lora_A.data, adapted.lora_B.data = adapted.lora_A.data.to(dtype), adapted.lora_B.data.to(dtype)
    return adapted
