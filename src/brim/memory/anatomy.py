"""What a model is made of, from its config alone: the linear layers, norms and embeddings of each block.

Counted structurally (by shape), so parameters, activations and FLOPs come from the same rows; the count is held
against `ModelSpec.num_parameters`. A family is one row; how a block's forward keeps tensors is in `kept`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from brim.errors import UsageError, did_you_mean
from brim.models.spec import ModelSpec

Norm = Literal["rms", "rms-gemma", "rms-t5", "layer"]

TABLE_RANKS = "table_ranks"
"""Key in the config of a device's share of a model (`memory.tensor`): devices that share embedding and head."""


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
    rotary: bool = True
    """Positions turn queries and keys."""
    activation: str = "silu"
    dropout: float = 0.0
    """What transformers assumes where the config is silent."""
    attention_dropout: float = 0.0
    softcaps: bool = False
    """Attention's scores and the logits go through tanh, where the config is silent."""
    unpacked: tuple[str, ...] = ()
    """Linears that transformers keeps in FP32, so that a packed base leaves them alone."""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "smollm3": Family(),
    "granite": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm="heads"),
    "olmo2": Family(norm="rms-gemma", qk_norm="whole"),  # normalized after, not before: as many tensors
    "stablelm": Family(norm="layer", turns_part=True),
    "phi3": Family(fused=True, turns_part=True),
    "gemma": Family(norm="rms-gemma", activation="gelu_pytorch_tanh"),
    "gemma2": Family(norm="rms-gemma", post_norms=True, activation="gelu_pytorch_tanh", softcaps=True),
    "gemma3_text": Family(norm="rms-gemma", post_norms=True, qk_norm="heads", activation="gelu_pytorch_tanh"),
    "gpt2": Family(
        norm="layer", gated=False, fused=True, bias=True, positions=0, rotary=False, activation="gelu_new",
        dropout=0.1, attention_dropout=0.1,
    ),
    "gpt_neox": Family(
        norm="layer", gated=False, fused=True, bias=True, turns_part=True, parallel=True, activation="gelu",
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
        norm="layer", gated=False, fused=True, bias=True, embedding_norm=True, rotary=False, activation="gelu",
    ),
    "opt": Family(norm="layer", gated=False, bias=True, positions=2, activation="relu", dropout=0.1),
    "t5": Family(
        norm="rms-t5", gated=False, activation="relu", dropout=0.1, attention_dropout=0.1, unpacked=("wo",),
    ),
    "mt5": Family(
        norm="rms-t5", gated=True, activation="gelu_new", dropout=0.1, attention_dropout=0.1, unpacked=("wo",),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    name: str
    """As the family calls it; what `lora.targets` names."""
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def num_parameters(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    into: tuple[Linear, ...]
    """Linears that make queries, keys and values."""
    out: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    cross: bool = False
    """Keys and values come from the encoder."""

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    into: tuple[Linear, ...]
    out: Linear
    gated: bool
    activation: str

    @property
    def width(self) -> int:
        return self.out.inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    attentions: tuple[Attention, ...]
    feed_forward: FeedForward

    @property
    def linears(self) -> Iterator[Linear]:
        for attention in self.attentions:
            yield from (*attention.into, attention.out)
        yield from (*self.feed_forward.into, self.feed_forward.out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Equal blocks one after another, and a norm at the end."""

    row: Literal["source", "target"]
    """Which row of a sequence-to-sequence batch runs through it; a decoder-only model has targets alone."""
    num_blocks: int
    block: Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    family: Family
    hidden_size: int
    vocab_size: int
    stacks: tuple[Stack, ...]
    tied_head: bool
    num_position_rows: int
    num_bias_buckets: int
    """Rows of each stack's relative position bias (T5); 0 without."""
    dropout: float
    attention_dropout: float
    parallel: bool
    caps_scores: bool
    caps_logits: bool
    table_ranks: int = 1
    """Devices that share the rows of embedding and head; each gathers all logits."""

    @property
    def embedding_parameters(self) -> int:
        """The token embedding alone; an untied head has as many again."""
        return self.vocab_size * self.hidden_size // self.table_ranks

    @property
    def embedding_gradients(self) -> int:
        """Elements of its gradient: where its rows are shared, DTensor's backward makes those of all rows."""
        return self.vocab_size * self.hidden_size

    @property
    def block_linear_parameters(self) -> int:
        return sum(stack.num_blocks * linear.num_parameters for stack in self.stacks for linear in stack.block.linears)

    @property
    def norm_parameters(self) -> int:
        return sum(stack.num_blocks * self._block_norms(stack.block) + self._norm for stack in self.stacks)

    @property
    def num_parameters(self) -> int:
        """Distinct parameters: the sum of the parts."""
        tables = self.num_position_rows * self.hidden_size
        buckets = sum(self.num_bias_buckets * stack.block.attentions[0].num_heads for stack in self.stacks)
        embeddings = self.embedding_parameters * (1 if self.tied_head else 2)
        embeddings += self.vocab_size * self.family.head_bias + self._norm * self.family.embedding_norm
        return embeddings + tables + buckets + self.block_linear_parameters + self.norm_parameters

    @property
    def _norm(self) -> int:
        return self.hidden_size * (2 if self.family.norm == "layer" else 1)

    def num_norms(self, block: Block) -> int:
        """Norms of the residual stream's width in a block."""
        if self.family.one_norm:
            return 1
        return (len(block.attentions) + 1) * (2 if self.family.post_norms else 1)

    def _block_norms(self, block: Block) -> int:
        widths = {
            "none": 0,
            "heads": sum(2 * attention.head_dim for attention in block.attentions),
            "whole": sum(attention.query_width + attention.key_width for attention in block.attentions),
        }
        return self.num_norms(block) * self._norm + widths[self.family.qk_norm]


def anatomy(spec: ModelSpec) -> Anatomy:
    """The parts of a model. Raises UsageError for a family without a row."""
    family = FAMILIES.get(spec.model_type)
    if family is None:
        raise UsageError(
            f"model {spec.name}: the closed form does not know the family {spec.model_type!r}"
            f"{did_you_mean(spec.model_type, FAMILIES)}; known: {', '.join(FAMILIES)}. "
            "`brim predict` rehearses any family"
        )
    encoder_decoder = spec.task == "seq2seq-lm"
    return Anatomy(
        family=family,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        stacks=_t5_stacks(spec) if encoder_decoder else (_decoder_only(spec, family),),
        tied_head=spec.tied_head,
        num_position_rows=0 if family.positions is None else family.positions + _positions(spec),
        num_bias_buckets=spec.first("relative_attention_num_buckets", default=32) if encoder_decoder else 0,
        dropout=_rate(spec, family.dropout, "resid_pdrop", "dropout_rate", "hidden_dropout", "dropout"),
        attention_dropout=_rate(spec, family.attention_dropout, "attn_pdrop", "dropout_rate", "attention_dropout"),
        parallel=bool(spec.config.get("use_parallel_residual", family.parallel)),
        caps_scores=bool(spec.config.get("attn_logit_softcapping", family.softcaps)),
        caps_logits=bool(spec.config.get("final_logit_softcapping", family.softcaps)),
        table_ranks=int(spec.config.get(TABLE_RANKS, 1)),
    )


def _decoder_only(spec: ModelSpec, family: Family) -> Stack:
    hidden, width = spec.hidden_size, spec.intermediate_size
    # Qwen2's config says `attention_bias` of q, k and v alone
    all_bias = family.bias or (bool(spec.config.get("attention_bias")) and not family.qkv_bias)
    into_bias = all_bias or family.qkv_bias or bool(spec.config.get("use_qkv_bias"))
    feed_bias = family.bias or family.feed_bias or bool(spec.config.get("mlp_bias"))
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    makes = [("qkv_proj", queries + 2 * keys)] if family.fused else [
        ("q_proj", queries), ("k_proj", keys), ("v_proj", keys)
    ]  # fmt: skip
    opens = [("fc1", width)]
    if family.gated:
        opens = [("gate_up_proj", 2 * width)] if family.fused else [("gate_proj", width), ("up_proj", width)]
    names = _GPT_NAMES.get(spec.model_type, {})
    attention = Attention(
        into=tuple(
            Linear(name=names.get(name, name), inputs=hidden, outputs=outputs, bias=into_bias)
            for name, outputs in makes
        ),
        out=Linear(name=names.get("o_proj", "o_proj"), inputs=queries, outputs=hidden, bias=all_bias),
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
    )
    feed_forward = FeedForward(
        into=tuple(
            Linear(name=names.get(name, name), inputs=hidden, outputs=outputs, bias=feed_bias)
            for name, outputs in opens
        ),
        out=Linear(name=names.get("down_proj", "down_proj"), inputs=width, outputs=hidden, bias=feed_bias),
        gated=family.gated,
        activation=_activation(spec, family),
    )
    return Stack(
        row="target", num_blocks=spec.num_layers, block=Block(attentions=(attention,), feed_forward=feed_forward)
    )


_GPT_NAMES = {
    "gpt2": {"qkv_proj": "c_attn", "o_proj": "c_proj", "fc1": "c_fc", "down_proj": "c_proj"},
    "gpt_neox": {
        "qkv_proj": "query_key_value",
        "o_proj": "dense",
        "fc1": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
    },
    "bloom": {
        "qkv_proj": "query_key_value",
        "o_proj": "dense",
        "fc1": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
    },
    "opt": {"o_proj": "out_proj", "down_proj": "fc2"},
    "phi": {"o_proj": "dense", "down_proj": "fc2"},
    "gptj": {"o_proj": "out_proj", "fc1": "fc_in", "down_proj": "fc_out"},
}


def _t5_stacks(spec: ModelSpec) -> tuple[Stack, ...]:
    hidden, width = spec.hidden_size, spec.intermediate_size
    inner = spec.num_heads * spec.head_dim
    style = str(spec.config.get("feed_forward_proj", "gated-gelu" if spec.model_type == "mt5" else "relu"))
    gated = style.startswith("gated-")
    # transformers maps "gated-gelu" to gelu_new (T5Config.__post_init__)
    activation = "gelu_new" if style == "gated-gelu" else style.removeprefix("gated-")

    def attention(*, cross: bool) -> Attention:
        return Attention(
            into=tuple(Linear(name=name, inputs=hidden, outputs=inner) for name in ("q", "k", "v")),
            out=Linear(name="o", inputs=inner, outputs=hidden),
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_heads,
            head_dim=spec.head_dim,
            cross=cross,
        )

    feed_forward = FeedForward(
        into=tuple(
            Linear(name=name, inputs=hidden, outputs=width) for name in (("wi_0", "wi_1") if gated else ("wi",))
        ),
        out=Linear(name="wo", inputs=width, outputs=hidden),
        gated=gated,
        activation=activation,
    )
    num_encoder_blocks = spec.first("num_layers")
    encoder = Block(attentions=(attention(cross=False),), feed_forward=feed_forward)
    decoder = Block(attentions=(attention(cross=False), attention(cross=True)), feed_forward=feed_forward)
    return (
        Stack(row="source", num_blocks=num_encoder_blocks, block=encoder),
        Stack(row="target", num_blocks=spec.num_layers - num_encoder_blocks, block=decoder),
    )


def _activation(spec: ModelSpec, family: Family) -> str:
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        if name := spec.config.get(key):
            return str(name)
    return family.activation


def _positions(spec: ModelSpec) -> int:
    return spec.first("n_positions", "max_position_embeddings", default=1024)


def _rate(spec: ModelSpec, default: float, *keys: str) -> float:
    return next((float(spec.config[key]) for key in keys if spec.config.get(key) is not None), default)
