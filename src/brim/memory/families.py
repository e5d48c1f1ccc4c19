"""How model types differ in what a block is made of and keeps: a row each. No torch."""

from dataclasses import dataclass
from typing import Literal

Norm = Literal["rms", "rms-gemma", "rms-t5", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a model type differs from Llama."""

    norm: Norm = "rms"
    gated: bool = True
    fused: bool = False
    """One linear makes q, k and v; in a gated feed-forward, one makes gate and up."""
    bias: bool = False
    """Every linear of a block has a bias."""
    feed_bias: bool = False
    """Those of the feed-forward have one."""
    qkv_bias: bool = False
    head_bias: bool = False
    experts: str = ""
    """The config's word for how many a block has; none: its feed-forward is one for all tokens."""
    qk_norm: Literal["none", "heads", "whole"] = "none"
    """Queries and keys are normalized, with a weight for each place of a head or of the whole width."""
    post_norms: bool = False
    """Attention and feed-forward are normalized after as well as before."""
    positions: int | None = None
    """Rows of a learned position table beyond the config's number of positions; None: no table."""
    parallel: bool = False
    """Attention and feed-forward start from the same tensor."""
    one_norm: bool = False
    """And from the same norm of it."""
    embedding_norm: bool = False
    """Embeddings are normalized."""
    wide_scores: bool = False
    """Eager attention multiplies queries and keys in FP32."""
    turns_part: bool = False
    """Rotary positions turn a part of each head, which is put together with the rest anew."""
    keeps_fused: bool = False
    """Queries and keys are turned into tensors of their own, values stay a view of what one linear made for all."""
    shares_by_hand: bool = False
    """Heads that share keys: `scaled_dot_product_attention` is not told so. One head of keys for all is broadcast,
    which the mathematical path alone can do; of several, each is copied for its heads."""
    activation: str = "silu"
    dropout: float = 0.0
    """What transformers assumes where the config is silent."""
    attention_dropout: float = 0.0
    softcaps: bool = False
    """Attention's scores and the logits go through tanh, where the config is silent."""
    turns_logits: bool = False
    """A factor or a bias makes other logits of the head's."""
    unpacked: tuple[str, ...] = ()
    """Linears that transformers keeps in FP32, so that a packed base leaves them alone."""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "smollm3": Family(),
    "granite": Family(turns_logits=True),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm="heads"),
    "olmo2": Family(norm="rms-gemma", qk_norm="whole"),  # normalized after, not before: as many tensors
    "mixtral": Family(experts="num_local_experts"),
    "qwen3_moe": Family(qk_norm="heads", experts="num_experts"),
    "olmoe": Family(qk_norm="whole", experts="num_experts"),
    "stablelm": Family(norm="layer", turns_part=True),
    "phi3": Family(fused=True, keeps_fused=True, turns_part=True),
    "gemma": Family(norm="rms-gemma", activation="gelu_pytorch_tanh"),
    "gemma2": Family(norm="rms-gemma", post_norms=True, activation="gelu_pytorch_tanh", softcaps=True),
    "gemma3_text": Family(norm="rms-gemma", post_norms=True, qk_norm="heads", activation="gelu_pytorch_tanh"),
    "gpt2": Family(
        norm="layer", gated=False, fused=True, bias=True, positions=0, activation="gelu_new",
        dropout=0.1, attention_dropout=0.1,
    ),
    "gpt_neox": Family(
        norm="layer", gated=False, fused=True, bias=True, keeps_fused=True, turns_part=True, parallel=True,
        activation="gelu",
    ),
    "gptj": Family(
        norm="layer", gated=False, feed_bias=True, head_bias=True, parallel=True, one_norm=True, wide_scores=True,
        activation="gelu_new",
    ),
    "phi": Family(
        norm="layer", gated=False, bias=True, head_bias=True, parallel=True, one_norm=True, turns_part=True,
        activation="gelu_new",
    ),
    "bloom": Family(
        norm="layer", gated=False, fused=True, bias=True, embedding_norm=True, activation="gelu",
    ),
    "falcon": Family(
        norm="layer", gated=False, fused=True, parallel=True, one_norm=True, shares_by_hand=True, activation="gelu",
    ),
    "bert": Family(
        norm="layer", gated=False, bias=True, positions=0, dropout=0.1, attention_dropout=0.1, activation="gelu",
    ),
    "roberta": Family(
        norm="layer", gated=False, bias=True, positions=0, dropout=0.1, attention_dropout=0.1, activation="gelu",
    ),
    "opt": Family(norm="layer", gated=False, bias=True, positions=2, activation="relu", dropout=0.1),
    "bart": Family(
        norm="layer", gated=False, bias=True, positions=2, activation="gelu", dropout=0.1, turns_logits=True
    ),
    "t5": Family(
        norm="rms-t5", gated=False, activation="relu", dropout=0.1, attention_dropout=0.1, unpacked=("wo",),
    ),
    "mt5": Family(
        norm="rms-t5", gated=True, activation="gelu_new", dropout=0.1, attention_dropout=0.1, unpacked=("wo",),
    ),
}  # fmt: skip
