"""litgpt's decoder (PyPI litgpt 0.4.0, model.py and lora.py), written for what it keeps, to rehearse its runs.

One class for all its models, unlike transformers' one for each. What costs memory otherwise than there:
- q, k and v are one interleaved product; v stays a view of it, so that all of it is kept.
- Keys and values of grouped heads are expanded before attention, and q and k are joined anew after the rotation, so
  that heads lie apart: joining attention's output is a copy, which a packed product keeps.
- One adapter for q, k and v (`AdaptedQKV`) copies its parts into place, and that copy keeps them.
- Adapters may be on the head, too.

Weights are random: files in Hugging Face form hold q, k and v apart. Sliding windows are ignored (their masks take no
other memory). Shapes: B rows, T tokens, H hidden size, N heads, D elements of a head, G groups of heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

from brim.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a family's block differs from Llama's."""

    norm: str = "rms"
    """rms, rms-unit (weights are offsets from one), or layer."""
    parallel: bool = False
    """Attention and feed-forward read the same residual."""
    shared_norm: bool = False
    gated: bool = True
    activation: str = "silu"
    bias: bool = False
    head_bias: bool = False
    scaled_embedding: bool = False
    post_norms: bool = False


_STYLES = {
    "llama": Style(),
    "mistral": Style(),
    "phi3": Style(),
    "gemma": Style(norm="rms-unit", activation="gelu_tanh", scaled_embedding=True),
    "gemma2": Style(norm="rms-unit", activation="gelu_tanh", scaled_embedding=True, post_norms=True),
    "gpt_neox": Style(norm="layer", parallel=True, gated=False, activation="gelu", bias=True),
    "falcon": Style(norm="layer", parallel=True, shared_norm=True, gated=False, activation="gelu"),
    "phi": Style(
        norm="layer", parallel=True, shared_norm=True, gated=False, activation="gelu_tanh", bias=True, head_bias=True
    ),
}


class Litgpt(PreTrainedModel):  # type: ignore[misc]
    """The decoder of a transformers config, as litgpt builds it; takes no padding mask."""

    config_class = PretrainedConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        style = _STYLES.get(config.model_type)
        if style is None:
            raise RecipeError(
                f'library.model = "litgpt" does not know the family {config.model_type!r}; known: '
                f'{", ".join(_STYLES)}; nearest: library.model = "transformers"'
            )
        self.scale = float(config.hidden_size**0.5) if style.scaled_embedding else None
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config, style) for _ in range(config.num_hidden_layers))
        self.ln_f = _norm(config, style)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=style.head_bias)
        self.post_init()

    @property
    def blocks(self) -> Iterator["Block"]:
        for block in self.h:
            assert isinstance(block, Block)
            yield block

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        cos_TD, sin_TD = _rotation(self.config, input_ids)
        x_BTH = self.wte(input_ids)
        if self.scale is not None:
            x_BTH = x_BTH * torch.tensor(self.scale, dtype=x_BTH.dtype)
        for block in self.h:
            x_BTH = block(x_BTH, cos_TD, sin_TD)
        return CausalLMOutput(logits=self.lm_head(self.ln_f(x_BTH)))


class Block(GradientCheckpointingLayer):  # type: ignore[misc]
    def __init__(self, config: PretrainedConfig, style: Style) -> None:
        super().__init__()
        self.style = style
        self.norm_1 = _norm(config, style)
        self.attn = Attention(config, style)
        self.post_attention_norm = _norm(config, style) if style.post_norms else nn.Identity()
        self.norm_2 = nn.Identity() if style.shared_norm else _norm(config, style)
        self.mlp = FeedForward(config, style)
        self.post_mlp_norm = _norm(config, style) if style.post_norms else nn.Identity()

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        normed_BTH = self.norm_1(x_BTH)
        attended_BTH = self.post_attention_norm(self.attn(normed_BTH, cos_TD, sin_TD))
        out_BTH: Tensor
        if self.style.parallel:
            normed_BTH = normed_BTH if self.style.shared_norm else self.norm_2(x_BTH)
            out_BTH = self.mlp(normed_BTH) + attended_BTH + x_BTH
        else:
            x_BTH = attended_BTH + x_BTH
            out_BTH = self.post_mlp_norm(self.mlp(self.norm_2(x_BTH))) + x_BTH
        return out_BTH


class Attention(nn.Module):
    def __init__(self, config: PretrainedConfig, style: Style) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = heads_of(config)
        self.softcap: float | None = getattr(config, "attn_logit_softcapping", None)
        self.attn: nn.Module = nn.Linear(
            config.hidden_size, (self.heads + 2 * self.groups) * self.head_dim, bias=style.bias
        )
        self.proj: nn.Module = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=style.bias)

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        rows, tokens, _ = x_BTH.shape
        shared = self.heads // self.groups
        made = self.attn(x_BTH).view(rows, tokens, self.groups, shared + 2, self.head_dim).permute(0, 2, 3, 1, 4)
        q, k, v = made.split((shared, 1, 1), dim=2)
        if self.groups != self.heads:
            k, v = (part.expand(rows, self.groups, shared, tokens, self.head_dim) for part in (k, v))
        q, k, v = (part.reshape(rows, -1, tokens, self.head_dim) for part in (q, k, v))
        turned = cos_TD.shape[-1]
        q, k = (
            torch.cat((_rotated(part[..., :turned], cos_TD, sin_TD), part[..., turned:]), dim=-1) for part in (q, k)
        )
        y_BTND = self._attend(q, k, v).transpose(1, 2)
        out_BTH: Tensor = self.proj(y_BTND.reshape(rows, tokens, -1))
        return out_BTH

    def _attend(self, q_BNTD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor) -> Tensor:
        scale = self.head_dim**-0.5
        if self.softcap is None:
            return F.scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, is_causal=True, scale=scale)
        scores = q_BNTD @ k_BNTD.mT * scale
        scores = torch.tanh(scores / self.softcap) * self.softcap
        mask = torch.ones(q_BNTD.shape[2], q_BNTD.shape[2], dtype=q_BNTD.dtype, device=q_BNTD.device).triu(diagonal=1)
        mask.masked_fill_(mask.bool(), torch.finfo(q_BNTD.dtype).min)
        scores = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q_BNTD.dtype)
        return scores @ v_BNTD


class FeedForward(nn.Module):
    def __init__(self, config: PretrainedConfig, style: Style) -> None:
        super().__init__()
        hidden = config.hidden_size
        wide = getattr(config, "ffn_hidden_size", None) or getattr(config, "intermediate_size", None) or 4 * hidden
        self.activation = style.activation
        self.fc_1 = nn.Linear(hidden, wide, bias=style.bias)
        self.fc_2 = nn.Linear(hidden, wide, bias=style.bias) if style.gated else None
        self.proj = nn.Linear(wide, hidden, bias=style.bias)

    def forward(self, x_BTH: Tensor) -> Tensor:
        first = self.fc_1(x_BTH)
        second = None if self.fc_2 is None else self.fc_2(x_BTH)
        if self.activation == "silu":
            made = F.silu(first)
        else:
            made = F.gelu(first, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        out_BTH: Tensor = self.proj(made if second is None else made * second)
        return out_BTH


class LitgptRMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float, *, from_one: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if from_one else torch.ones(size))
        self.epsilon, self.from_one = epsilon, from_one

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + self.epsilon)
        normed = normed.to(x.dtype)
        return normed * (1 + self.weight) if self.from_one else normed * self.weight


def heads_of(config: Any) -> tuple[int, int, int]:
    """Heads, groups of them that share keys and values, and elements of a head."""
    heads = int(config.num_attention_heads)
    if config.model_type == "falcon":
        groups = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
    else:
        groups = getattr(config, "num_key_value_heads", None) or heads
    return heads, int(groups), int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _norm(config: Any, style: Style) -> nn.Module:
    if style.norm == "layer":
        return nn.LayerNorm(config.hidden_size)
    return LitgptRMSNorm(config.hidden_size, config.rms_norm_eps, from_one=style.norm == "rms-unit")


def _rotation(config: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos_TD and sin_TD in FP32, whatever the weights: the cache is made anew when the longest row is known."""
    rope = getattr(config, "rope_parameters", None) or {}
    turned = int(rope.get("partial_rotary_factor", 1.0) * heads_of(config)[2])
    device = input_ids.device
    theta = 1.0 / (10000 ** (torch.arange(0, turned, 2, device=device).float() / turned))
    angles = torch.outer(torch.arange(input_ids.shape[1], device=device).float(), theta).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return ((x * cos_TD) + (turned * sin_TD)).to(x.dtype)
