"""Parameters by closed form from a config alone, for a model whose files are not at hand. No torch.

One row per family says what its blocks hold; the sum is over tensors, each counted once. Checked in the tests against
the catalogue's counts, which were made by building the models. Letters: h hidden, i intermediate, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from brim.errors import UnknownNameError
from brim.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """Decoders of the Llama line: RMS norms, grouped attention, a gated feed-forward, perhaps experts."""

    norms: int = 2
    """Norm vectors of h elements in a block."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Norms of queries and keys: one of head_dim elements each, or as wide as all heads."""
    bias: Literal["none", "qkv", "config"] = "none"
    """Attention biases; `config` asks attention_bias (q, k, v, o) and mlp_bias."""
    experts: str = ""
    """Config key that holds the number of experts."""
    tied: bool = False
    """The class's default where the config does not say."""


GATED: Mapping[str, Gated] = {
    "llama": Gated(bias="config"),
    "mistral": Gated(),
    "phi3": Gated(),
    "granite": Gated(bias="config", tied=True),
    "smollm3": Gated(bias="config", tied=True),
    "olmo2": Gated(qk_norm="full", bias="config"),
    "qwen2": Gated(bias="qkv"),
    "qwen3": Gated(qk_norm="head", bias="config"),
    "gemma": Gated(bias="config", tied=True),
    "gemma2": Gated(norms=4, bias="config", tied=True),
    "gemma3_text": Gated(norms=4, qk_norm="head", bias="config", tied=True),
    "mixtral": Gated(experts="num_local_experts"),
    "olmoe": Gated(qk_norm="full", experts="num_experts"),
    "qwen3_moe": Gated(qk_norm="head", bias="config", experts="num_experts"),
}


def count_from_config(spec: ModelSpec) -> int:
    """Distinct parameters of the model that this config describes; the head as `spec.tied_head` says.

    Raises UnknownNameError for a family without a row here.
    """
    if spec.model_type in GATED:
        return _gated(spec, GATED[spec.model_type])
    if spec.model_type in _OTHERS:
        return _OTHERS[spec.model_type](spec)
    raise UnknownNameError(
        f"{spec.name}: parameters of model_type {spec.model_type!r} cannot be counted from its config alone "
        f"(known: {', '.join(known())}); put its safetensors files beside config.json"
    )


def known() -> tuple[str, ...]:
    """Families that can be counted."""
    return (*GATED, *_OTHERS)


def tied_by_config(config: Mapping[str, Any]) -> bool:
    """Whether head and embedding are one, as the config says or its class assumes."""
    if (declared := config.get("tie_word_embeddings")) is not None:
        return bool(declared)
    family = str(config.get("model_type"))
    return GATED[family].tied if family in GATED else family not in ("gpt_neox", "gptj", "phi")


def _embeddings(spec: ModelSpec) -> int:
    """Token embedding and head: V h, twice where they are two."""
    return (1 if spec.tied_head else 2) * spec.vocab_size * spec.hidden_size


def _gated(spec: ModelSpec, row: Gated) -> int:
    h, config = spec.hidden_size, spec.config
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = h * q + 2 * h * kv + q * h
    if row.bias == "qkv" or (row.bias == "config" and config.get("attention_bias")):
        attention += q + 2 * kv + (h if row.bias == "config" else 0)
    qk_norm = {"none": 0, "head": 2 * spec.head_dim, "full": q + kv}[row.qk_norm]
    block = attention + qk_norm + row.norms * h + _feed_forward(spec, row)
    return _embeddings(spec) + spec.num_layers * block + h


def _feed_forward(spec: ModelSpec, row: Gated) -> int:
    h = spec.hidden_size
    if row.experts:
        experts = spec.first(row.experts)
        return experts * 3 * h * spec.first("moe_intermediate_size", "intermediate_size") + h * experts
    i = spec.intermediate_size
    bias = 2 * i + h if row.bias == "config" and spec.config.get("mlp_bias") else 0
    return 3 * h * i + bias


def _gpt2(spec: ModelSpec) -> int:
    h, i = spec.hidden_size, spec.intermediate_size
    block = 4 * h * h + 4 * h + 2 * h * i + i + h + 4 * h
    return _embeddings(spec) + spec.first("n_positions") * h + spec.num_layers * block + 2 * h


def _opt(spec: ModelSpec) -> int:
    h, i = spec.hidden_size, spec.intermediate_size
    narrow = spec.first("word_embed_proj_dim", default=h)
    # OPT's position table begins two places late.
    embedding = (1 if spec.tied_head else 2) * spec.vocab_size * narrow + (
        spec.first("max_position_embeddings") + 2
    ) * h
    projections = 0 if narrow == h else 2 * narrow * h
    has_final_norm = spec.config.get("do_layer_norm_before", True) and not spec.config.get("_remove_final_layer_norm")
    block = 4 * h * h + 4 * h + 2 * h * i + i + h + 4 * h
    return embedding + projections + spec.num_layers * block + (2 * h if has_final_norm else 0)


def _bloom(spec: ModelSpec) -> int:
    h = spec.hidden_size
    return _embeddings(spec) + 2 * h + spec.num_layers * (12 * h * h + 13 * h) + 2 * h


def _gpt_neox(spec: ModelSpec) -> int:
    h, i = spec.hidden_size, spec.intermediate_size
    block = 4 * h * h + 4 * h + 2 * h * i + i + h + 4 * h
    return _embeddings(spec) + spec.num_layers * block + 2 * h


def _t5(spec: ModelSpec) -> int:
    h, inner = spec.hidden_size, spec.num_heads * spec.head_dim
    gated = "gated" in str(spec.config.get("feed_forward_proj", "relu"))
    attention, feed_forward = 4 * h * inner, (3 if gated else 2) * h * spec.intermediate_size
    encoder_layers = spec.first("num_layers")
    decoder_layers = spec.first("num_decoder_layers", default=encoder_layers)
    encoder = encoder_layers * (attention + feed_forward + 2 * h)
    decoder = decoder_layers * (2 * attention + feed_forward + 3 * h)
    # One table of relative positions and one final norm in each stack.
    stacks = 2 * (spec.first("relative_attention_num_buckets", default=32) * spec.num_heads + h)
    return _embeddings(spec) + encoder + decoder + stacks


_OTHERS: Mapping[str, Callable[[ModelSpec], int]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "bloom": _bloom,
    "gpt_neox": _gpt_neox,
    "t5": _t5,
    "mt5": _t5,
}
