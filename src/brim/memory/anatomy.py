"""What a model is made of, from its config alone: the linear layers, norms and embeddings of each block.

Counted structurally (by shape), so parameters, activations and FLOPs come from the same rows; the count is held
against `ModelSpec.num_parameters`. A family is one row; how a block's forward keeps tensors is in `kept`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from brim.errors import UsageError, did_you_mean
from brim.memory.families import FAMILIES, Family
from brim.models.spec import ModelSpec

TABLE_RANKS = "table_ranks"
"""Key in the config of a device's share of a model (`memory.tensor`): devices that share embedding and head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    name: str
    """As the family calls it; what `lora.targets` names."""
    inputs: int
    outputs: int
    bias: bool = False
    experts: int = 1
    """Each of which has such a matrix."""
    visited: int = 1
    """By a token."""
    fused: int = 1
    """Matrices of an expert that are one tensor (gate and up), and packed or adapted one by one."""

    @property
    def num_weights(self) -> int:
        return self.experts * self.inputs * self.outputs

    @property
    def num_parameters(self) -> int:
        return self.num_weights + (self.outputs if self.bias else 0)


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

    @property
    def num_experts(self) -> int:
        return self.out.experts


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
    one_norm: bool
    caps_scores: bool
    caps_logits: bool
    turns_logits: bool
    table_ranks: int = 1
    """Devices that share the rows of embedding and head; each gathers all logits."""
    embedding_width: int
    """Of a token's row; where it is not the blocks', a linear layer turns it into theirs, and one turns it back."""
    ends_in_norm: bool = True

    @property
    def embedding_parameters(self) -> int:
        """The token embedding alone; an untied head has as many again."""
        return self.vocab_size * self.embedding_width // self.table_ranks

    @property
    def embedding_gradients(self) -> int:
        """Elements of its gradient: where its rows are shared, DTensor's backward makes those of all rows."""
        return self.vocab_size * self.embedding_width

    @property
    def block_linear_parameters(self) -> int:
        return sum(stack.num_blocks * linear.num_parameters for stack in self.stacks for linear in stack.block.linears)

    @property
    def norm_parameters(self) -> int:
        return sum(
            stack.num_blocks * self._block_norms(stack.block) + self.ends_in_norm * self._norm for stack in self.stacks
        )

    @property
    def num_parameters(self) -> int:
        """Distinct parameters: the sum of the parts."""
        tables = self.num_position_rows * self.hidden_size
        if self.embedding_width != self.hidden_size:
            tables += 2 * self.embedding_width * self.hidden_size
        buckets = sum(self.num_bias_buckets * stack.block.attentions[0].num_heads for stack in self.stacks)
        embeddings = self.embedding_parameters * (1 if self.tied_head else 2)
        embeddings += self.vocab_size * self.family.head_bias + self._norm * self.family.embedding_norm
        return embeddings + tables + buckets + self.block_linear_parameters + self.norm_parameters

    @property
    def _norm(self) -> int:
        return self.hidden_size * (2 if self.family.norm == "layer" else 1)

    def num_norms(self, block: Block) -> int:
        """Norms of the residual stream's width in a block."""
        if self.one_norm:
            return 1
        return (len(block.attentions) + 1) * (2 if self.family.post_norms else 1)

    def _block_norms(self, block: Block) -> int:
        widths = {
            "none": 0,
            "heads": sum(2 * attention.head_dim for attention in block.attentions),
            "whole": sum(attention.query_width + attention.key_width for attention in block.attentions),
        }
        routes = block.feed_forward.num_experts * self.hidden_size if self.family.experts else 0
        return self.num_norms(block) * self._norm + widths[self.family.qk_norm] + routes


class _Same:
    """A model by identity: its config is no key, and is not changed once it has been described."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def __hash__(self) -> int:
        return id(self.spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.spec is self.spec


def anatomy(spec: ModelSpec) -> Anatomy:
    """The parts of a model. Raises UsageError for a family without a row."""
    return _anatomy(_Same(spec))


@lru_cache(maxsize=16)  # a search asks a thousand times of a few
def _anatomy(same: _Same) -> Anatomy:
    spec = same.spec
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
        stacks=_two_stacks(spec, family) if encoder_decoder else (_decoder_only(spec, family),),
        tied_head=spec.tied_head,
        num_position_rows=0 if family.positions is None else family.positions + _positions(spec),
        num_bias_buckets=spec.first("relative_attention_num_buckets", default=32) if family.norm == "rms-t5" else 0,
        dropout=_rate(
            spec, family.dropout, "resid_pdrop", "dropout_rate", "hidden_dropout", "hidden_dropout_prob", "dropout"
        ),
        attention_dropout=_rate(
            spec,
            family.attention_dropout,
            "attn_pdrop",
            "dropout_rate",
            "attention_dropout",
            "attention_probs_dropout_prob",
        ),
        parallel=bool(spec.config.get("use_parallel_residual", family.parallel)),
        one_norm=family.one_norm and not spec.config.get("new_decoder_architecture"),
        caps_scores=bool(spec.config.get("attn_logit_softcapping", family.softcaps)),
        caps_logits=bool(spec.config.get("final_logit_softcapping", family.softcaps)),
        turns_logits=family.turns_logits,
        table_ranks=int(spec.config.get(TABLE_RANKS, 1)),
        embedding_width=spec.first("word_embed_proj_dim", default=spec.hidden_size),
        ends_in_norm=bool(spec.config.get("do_layer_norm_before", True)),
    )


def _decoder_only(spec: ModelSpec, family: Family) -> Stack:
    hidden, width = spec.hidden_size, spec.intermediate_size
    # Qwen2's config says `attention_bias` of q, k and v alone
    all_bias = family.bias or (bool(spec.config.get("attention_bias")) and not family.qkv_bias)
    into_bias = all_bias or family.qkv_bias or bool(spec.config.get("use_qkv_bias"))
    feed_bias = family.bias or family.feed_bias or bool(spec.config.get("mlp_bias"))
    num_kv_heads = _key_heads(spec, family)
    queries, keys = spec.num_heads * spec.head_dim, num_kv_heads * spec.head_dim
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
        num_kv_heads=num_kv_heads,
        head_dim=spec.head_dim,
    )
    feed_forward = (
        _experts(spec, family)
        if family.experts
        else FeedForward(
            into=tuple(
                Linear(name=names.get(name, name), inputs=hidden, outputs=outputs, bias=feed_bias)
                for name, outputs in opens
            ),
            out=Linear(name=names.get("down_proj", "down_proj"), inputs=width, outputs=hidden, bias=feed_bias),
            gated=family.gated,
            activation=_activation(spec, family),
        )
    )
    return Stack(
        row="target", num_blocks=spec.num_layers, block=Block(attentions=(attention,), feed_forward=feed_forward)
    )


def _experts(spec: ModelSpec, family: Family) -> FeedForward:
    """As transformers 5 holds them: gate and up of all experts in one tensor, down in another."""
    width = spec.first("moe_intermediate_size", default=spec.intermediate_size)
    many, visited, hidden = spec.first(family.experts), spec.first("num_experts_per_tok"), spec.hidden_size
    gate_up = Linear(name="gate_up_proj", inputs=hidden, outputs=2 * width, experts=many, visited=visited, fused=2)
    return FeedForward(
        into=(gate_up,),
        out=Linear(name="down_proj", inputs=width, outputs=hidden, experts=many, visited=visited),
        gated=True,
        activation=_activation(spec, family),
    )


_SEQ2SEQ_NAMES = {
    "bart": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj", "wi": "fc1", "wo": "fc2"},
}
_BERT_NAMES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "dense",
    "fc1": "dense",
    "down_proj": "dense",
}
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
    "falcon": {
        "qkv_proj": "query_key_value",
        "o_proj": "dense",
        "fc1": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
    },
    "bert": _BERT_NAMES,
    "roberta": _BERT_NAMES,
    "opt": {"o_proj": "out_proj", "down_proj": "fc2"},
    "phi": {"o_proj": "dense", "down_proj": "fc2"},
    "gptj": {"o_proj": "out_proj", "fc1": "fc_in", "down_proj": "fc_out"},
}


def _two_stacks(spec: ModelSpec, family: Family) -> tuple[Stack, ...]:
    names, bias = _SEQ2SEQ_NAMES.get(spec.model_type, {}), family.bias
    hidden, width = spec.hidden_size, spec.intermediate_size
    inner = spec.num_heads * spec.head_dim
    usual = "gated-gelu" if spec.model_type == "mt5" else _activation(spec, family)
    style = str(spec.config.get("feed_forward_proj", usual))
    gated = style.startswith("gated-")
    # transformers maps "gated-gelu" to gelu_new (T5Config.__post_init__)
    activation = "gelu_new" if style == "gated-gelu" else style.removeprefix("gated-")

    def attention(*, cross: bool) -> Attention:
        return Attention(
            into=tuple(
                Linear(name=names.get(name, name), inputs=hidden, outputs=inner, bias=bias) for name in ("q", "k", "v")
            ),
            out=Linear(name=names.get("o", "o"), inputs=inner, outputs=hidden, bias=bias),
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_heads,
            head_dim=spec.head_dim,
            cross=cross,
        )

    feed_forward = FeedForward(
        into=tuple(
            Linear(name=names.get(name, name), inputs=hidden, outputs=width, bias=bias)
            for name in (("wi_0", "wi_1") if gated else ("wi",))
        ),
        out=Linear(name=names.get("wo", "wo"), inputs=width, outputs=hidden, bias=bias),
        gated=gated,
        activation=activation,
    )
    num_encoder_blocks = spec.first("encoder_layers", "num_layers")
    encoder = Block(attentions=(attention(cross=False),), feed_forward=feed_forward)
    decoder = Block(attentions=(attention(cross=False), attention(cross=True)), feed_forward=feed_forward)
    return (
        Stack(row="source", num_blocks=num_encoder_blocks, block=encoder),
        Stack(row="target", num_blocks=spec.num_layers - num_encoder_blocks, block=decoder),
    )


def _key_heads(spec: ModelSpec, family: Family) -> int:
    """Falcon has one for all, or says how many in a word of its own."""
    if not family.shares_by_hand:
        return spec.num_kv_heads
    several = spec.config.get("new_decoder_architecture") or not spec.config.get("multi_query", True)
    return spec.first("num_kv_heads", default=spec.num_heads) if several else 1


def _activation(spec: ModelSpec, family: Family) -> str:
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        if name := spec.config.get(key):
            return str(name)
    return family.activation


def _positions(spec: ModelSpec) -> int:
    return spec.first("n_positions", "max_position_embeddings", default=1024)


def _rate(spec: ModelSpec, default: float, *keys: str) -> float:
    return next((float(spec.config[key]) for key in keys if spec.config.get(key) is not None), default)
