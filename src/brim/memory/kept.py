"""Bytes that a block's forward keeps for its backward, tensor by tensor.

What autograd keeps is decided by each operator: a linear keeps its input (if its weight, or an adapter on it, is
trained) and a multiplication keeps both sides (if both need a gradient). The rules below were derived by reading the
modules of transformers 5.23 and checked against PyTorch's profiler on small models, one rule at a time.

Letters: B rows, T tokens of a row, S keys of a row, h hidden size, w feed-forward width, e bytes of an element.
"""

from dataclasses import dataclass

from brim.memory.anatomy import Anatomy, Attention, Block, FeedForward, Linear, Stack
from brim.recipe import Recipe

FP32, BF16 = 4, 2
ELEMENT_BYTES = {"fp32": FP32, "bf16": BF16, "fp16": BF16}

_INDEX_BYTES = 8
_ACTIVATION_KEEPS = {"relu": 0, "gelu_new": 4, "gelu_fast": 5}
"""Tensors of its input's size that an activation keeps beside its output; the fused ones (silu, gelu,
gelu_pytorch_tanh) keep their input alone. gelu_new is written in Python: x, 0.5 x, tanh, 1 + tanh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What of a recipe decides which tensors are kept, and how large."""

    parts: Anatomy
    rows: int
    source_len: int
    target_len: int
    weight_bytes: int
    compute_bytes: int
    trains_base: bool
    rank: int
    """0 without adapters."""
    update_rank: int
    """Of updates within rounded weights: they see no activation. 0 without."""
    targets: tuple[str, ...]
    adapter_dropout: bool
    eager: bool
    shares_rows: bool
    """Several examples a row: attention takes a mask, which it keeps, and with it no grouped heads."""
    packed: bool
    """Each linear's weight is made anew for its product, of frozen codes."""
    rounds: bool
    """Each linear's weight is made anew for its product, rounded with a scale that is learned."""

    @property
    def mixed(self) -> bool:
        """Autocast: matmuls in BF16 over FP32 weights; every linear makes a BF16 copy of its input and weight."""
        return self.compute_bytes < self.weight_bytes

    def adapts(self, linear: Linear) -> bool:
        """Packed experts have no adapters (`training.adapters`)."""
        if linear.experts > 1 and self.packed:
            return False
        return self.rank > 0 and (self.targets == ("all-linear",) or linear.name in self.targets)

    def keeps_input(self, linear: Linear) -> bool:
        """An adapter with dropout keeps what that leaves of its input, instead (`_adapters`)."""
        return self.trains_base or self.rounds or (self.adapts(linear) and not self.adapter_dropout)

    def adapter_parameters(self, block: Block) -> int:
        return sum(
            self.rank * line.fused * line.experts * (line.inputs + line.outputs)
            for line in block.linears
            if self.adapts(line)
        )

    def added_parameters(self, block: Block) -> int:
        """Of adapters, or of updates."""
        updates = sum(self.update_rank * (line.inputs + line.outputs) for line in block.linears)
        return updates + self.adapter_parameters(block)


def terms(parts: Anatomy, recipe: Recipe) -> Terms:
    encoder_decoder = len(parts.stacks) > 1
    return Terms(
        parts=parts,
        rows=recipe.micro_batch_size,
        source_len=recipe.seq_len if encoder_decoder else 0,
        target_len=recipe.target_len if encoder_decoder else recipe.seq_len,
        weight_bytes=ELEMENT_BYTES[recipe.plain_format],
        compute_bytes=ELEMENT_BYTES[recipe.precision.compute],
        trains_base=recipe.trains_weights,
        rank=recipe.lora.rank if recipe.adapts else 0,
        update_rank=recipe.lora.rank if recipe.updates_rounded else 0,
        targets=recipe.lora.targets,
        adapter_dropout=recipe.adapts and recipe.lora.dropout > 0,
        eager=recipe.memory.attention == "eager",
        shares_rows=recipe.training.packing,
        packed=recipe.precision.packed,
        rounds=recipe.method == "qat",
    )


def block_bytes(block: Block, tokens: int, t: Terms) -> int:
    """All that one block keeps, its BF16 copies of weights included (they live as long)."""
    attentions = sum(attention_bytes(attention, tokens, t) for attention in block.attentions)
    return attentions + feed_forward_bytes(block.feed_forward, tokens, t) + weight_cast_bytes(block, t)


def attention_bytes(attention: Attention, tokens: int, t: Terms) -> int:
    """Norm, q, k, v, attention itself, output projection, and the residual's dropout; of all rows."""
    hidden, count = t.parts.hidden_size, t.rows * tokens
    keys = t.source_len if attention.cross else tokens
    kept = _norms(count, t) + _normed_input(attention.into[: 1 if attention.cross else None], count, t)
    if attention.cross and t.mixed:
        kept += 2 * BF16 * t.rows * keys * hidden  # k's and v's copies of the encoder's output
    if t.parts.family.qk_norm != "none":
        kept += count * (attention.query_width + attention.key_width) * _norm_bytes(t)
    kept += _scores(attention, tokens, keys, t)
    if t.parts.family.turns_part and not t.eager and t.keeps_input(attention.out):
        kept += t.compute_bytes * count * attention.query_width  # heads that `cat` laid apart are joined by a copy
    if t.mixed and t.adapts(attention.out):
        kept += BF16 * count * attention.query_width  # the adapter casts its input for itself
    if t.parts.dropout:
        kept += t.compute_bytes * count * hidden
    return kept + _adapters((*attention.into, attention.out), count, t)


def feed_forward_bytes(feed: FeedForward, tokens: int, t: Terms) -> int:
    """Norm, the activation's operands and the down projection's input; of all rows.

    Gated: gate, act(gate), up and their product, 4 w e (silu). Plain: input and output of the activation.
    """
    count = t.rows * tokens
    if feed.num_experts > 1:
        return _norms(count, t) + experts_bytes(feed, count, t)
    wide = t.compute_bytes * count * feed.width
    operands = _ACTIVATION_KEEPS.get(feed.activation, 1) + (2 if feed.gated else 0)
    relu_result = not feed.gated and feed.activation == "relu"
    dropout_here = t.parts.family.norm == "rms-t5" and t.parts.dropout > 0
    # relu keeps its result, and the down projection keeps the same tensor unless something stands between
    copied = dropout_here or (t.mixed and (t.parts.family.norm == "rms-t5" or t.adapts(feed.out)))
    operands += relu_result + dropout_here
    if t.keeps_input(feed.out) and (copied or not relu_result):
        operands += 1
    kept = operands * wide
    if not t.parts.one_norm:  # else attention has the norm, and keeps its output
        kept += _norms(count, t) + _normed_input(feed.into, count, t)
    if t.parts.parallel and not t.parts.one_norm:
        kept -= t.weight_bytes * count * t.parts.hidden_size  # the input of attention's norm, kept there
    if t.parts.dropout:
        kept += t.compute_bytes * count * t.parts.hidden_size
    return kept + _adapters((*feed.into, feed.out), count, t)


def experts_bytes(feed: FeedForward, count: int, t: Terms) -> int:
    """Routing, and the experts' products (transformers' integrations/moe.py; packed: `layers.packed_experts`).

    A place is a token at one of the experts that it visits. Of each: gate and up together, act(gate), their product,
    the result that its route weighs, and indices of 8 bytes; the sorted inputs, where the experts learn. Autocast does
    not know the grouped product: it runs in the format of the weights. PEFT adds an adapter to the matrices of all
    experts before the product, which keeps the sums.
    """
    (into,) = feed.into
    places, hidden = count * into.visited, t.parts.hidden_size
    element_bytes = t.compute_bytes if t.packed else t.weight_bytes
    learns = t.keeps_input(into), t.keeps_input(feed.out)
    each = element_bytes * (3 * feed.width + hidden + learns[0] * hidden + learns[1] * feed.width)
    each += (2 if t.packed else 3) * _INDEX_BYTES
    routes = count * (FP32 * feed.num_experts + _INDEX_BYTES * into.visited)
    normed = element_bytes * count * hidden if t.trains_base else 0
    return places * each + routes + normed + merged_bytes(feed, t)


def merged_bytes(feed: FeedForward, t: Terms) -> int:
    """Weights and adapters of all experts, added up for a product."""
    return t.weight_bytes * sum(line.num_weights for line in (*feed.into, feed.out) if t.adapts(line))


def linear_result_bytes(block: Block, tokens: int, t: Terms) -> int:
    """What all linears of a block give, and the narrow halves of adapters: what selective checkpointing keeps."""
    adapted = sum(t.rank + line.outputs for line in block.linears if t.adapts(line) and line.experts == 1)
    results = sum(line.visited * line.outputs for line in block.linears)
    return t.compute_bytes * t.rows * tokens * (results + adapted)


def weight_cast_bytes(block: Block, t: Terms) -> int:
    """BF16 copies of FP32 weights under autocast; backward needs them, frozen or not."""
    if not t.mixed:
        return 0
    cast = sum(line.num_parameters for line in block.linears if line.experts == 1)
    return BF16 * (t.adapter_parameters(block) + (0 if t.packed or t.rounds else cast))


def stack_bytes(stack: Stack, tokens: int, t: Terms) -> int:
    """Outside the blocks: the norm at the end and its output, dropout at both ends, T5's position biases."""
    count = t.rows * tokens
    output = t.compute_bytes if t.trains_base or stack.row == "source" else 0
    ends = (2 if t.parts.family.norm == "rms-t5" else 1) * t.weight_bytes if t.parts.dropout else 0
    return count * t.parts.hidden_size * (_norm_bytes(t) + output + ends) + bias_bytes(stack, tokens, t)


def bias_bytes(stack: Stack, tokens: int, t: Terms) -> int:
    """T5's position biases, one of each attention for all blocks and rows."""
    if not t.parts.num_bias_buckets:
        return 0
    keys = sum(t.source_len if attention.cross else tokens for attention in stack.block.attentions)
    return t.weight_bytes * stack.block.attentions[0].num_heads * tokens * keys


def mask_bytes(block: Block, tokens: int, t: Terms) -> int:
    """T5's masks with the bias in them, for each row, alive while their block runs."""
    if not t.parts.num_bias_buckets:
        return 0
    keys = sum(t.source_len if attention.cross else tokens for attention in block.attentions)
    return t.compute_bytes * t.rows * block.attentions[0].num_heads * tokens * keys


def score_gradient_bytes(attention: Attention, tokens: int, t: Terms) -> int:
    """Gradients of an attention's scores, where they are materialized, less what has been freed by then.

    The mathematical path, measured: two FP32 tensors, or one where it upcasts its inputs. Eager: what comes into its
    softmax and what leaves it, both FP32.
    """
    scores = t.rows * attention.num_heads * tokens * (t.source_len if attention.cross else tokens)
    if t.eager:
        return 2 * FP32 * scores
    if not _takes_scores(attention, t):
        return 0
    both = t.compute_bytes == FP32 or _broadcasts_keys(attention, t)
    return (2 if both else 1) * FP32 * scores


def _takes_scores(attention: Attention, t: Terms) -> bool:
    """The mathematical path: for dropout, and for a mask that needs a gradient (T5's trained position bias)."""
    biased = t.parts.num_bias_buckets > 0
    if _broadcasts_keys(attention, t):
        return True
    return t.parts.attention_dropout > 0 or (biased and t.trains_base and not attention.cross)


def _broadcasts_keys(attention: Attention, t: Terms) -> bool:
    return t.parts.family.shares_by_hand and 1 == attention.num_kv_heads < attention.num_heads


def _norms(count: int, t: Terms) -> int:
    """Norm before a sub-layer, and after it where the family has one (whose output is not kept)."""
    num = 2 if t.parts.family.post_norms else 1
    statistics = 8 if t.parts.family.norm == "layer" else 4
    return num * count * (t.parts.hidden_size * _norm_bytes(t) + statistics)


def _norm_bytes(t: Terms) -> int:
    """Per element of its input. RMS norms are written in Python and square in FP32."""
    stream, trained = t.weight_bytes, t.trains_base
    match t.parts.family.norm:
        case "layer":
            return stream
        case "rms-gemma":
            return FP32 + (FP32 if trained else 0)
        case "rms-t5":
            return FP32 + (stream if stream < FP32 else 0) + (stream if trained else 0)
        case "rms":
            return FP32 + (stream if trained else 0)


def _normed_input(consumers: tuple[Linear, ...], count: int, t: Terms) -> int:
    """The norm's output: one tensor for all linears that read it; under autocast each has its own BF16 copy."""
    keepers = sum(t.keeps_input(linear) for linear in consumers)
    return t.compute_bytes * count * t.parts.hidden_size * (keepers if t.mixed else min(keepers, 1))


def _scores(attention: Attention, tokens: int, keys: int, t: Terms) -> int:
    """q, k, v, the output, and what attention keeps of its scores.

    Flash kernel: an FP32 log-sum-exp per row and head. It does not take dropout, nor a mask that needs a gradient
    (T5's trained position bias): then the mathematical path runs in FP32 and keeps probabilities (4 bytes a score)
    and, with dropout, its mask and their product (8 more).
    """
    e, count, scores = t.compute_bytes, t.rows * tokens, t.rows * attention.num_heads * tokens * keys
    queries, width = count * attention.query_width, t.rows * keys * attention.key_width
    dropout = t.parts.attention_dropout > 0
    views = e * (queries + width) if t.parts.family.keeps_fused else 0
    if t.eager:
        expanded = t.rows * keys * attention.query_width
        probabilities = FP32 if e == FP32 else FP32 + e
        capped = e if t.parts.caps_scores else 0  # tanh keeps its result
        each = probabilities + capped + (2 * e if dropout else 0)
        wider = (FP32 - e) * (queries + expanded) if t.parts.family.wide_scores else 0
        return e * (2 * queries + 2 * expanded) + wider + scores * each + views
    if _takes_scores(attention, t):
        expanded = t.rows * keys * attention.query_width
        return e * queries + FP32 * (queries + 2 * expanded) + scores * (3 * FP32 if dropout else FP32) + views
    mask = e * scores if t.parts.num_bias_buckets else 0
    if t.shares_rows or t.parts.family.shares_by_hand:
        width = t.rows * keys * attention.query_width
    if t.shares_rows:
        mask = e * t.rows * tokens * keys
    return e * 2 * (queries + width) + FP32 * count * attention.num_heads + mask + views


def _adapters(linears: tuple[Linear, ...], count: int, t: Terms) -> int:
    """The narrow tensor between an adapter's two matrices; with dropout a mask of its input, and what is left of it."""
    dropped = 2 * t.adapter_dropout
    adapted = (t.rank + dropped * linear.inputs for linear in linears if t.adapts(linear))
    return t.compute_bytes * count * sum(adapted)
