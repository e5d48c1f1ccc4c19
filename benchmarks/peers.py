"""What other tools' published rules say of a row: bytes by tool, from the dimensions of the model alone.

A tool without a rule for such a run (packed weights, adapters, sharding, another architecture) is absent. Where a rule
ends in a flat amount for CUDA, it is added for counters that see it: nvidia-smi and unspecified ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.published import Case, Row

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_GB = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """H, L, heads, K (width of all key heads), M, V and E (experts) of a decoder with gated feed-forwards."""

    hidden: int
    layers: int
    heads: int
    query: int
    keys: int
    inner: int
    vocab: int
    experts: int


def peers(case: Case, row: Row) -> dict[str, int]:
    """Bytes by tool."""
    rules: dict[str, Callable[[Case, Row], int | None]] = {
        "accelerate 4x": _accelerate_training,
        "accelerate 1.2x": _accelerate_inference,
        "DeepSpeed ZeRO-2": _deepspeed,
        "llm-analysis": _llm_analysis,
        "Unsloth": _unsloth,
        "vramcalc": _vramcalc,
    }
    told = {tool: rule(case, row) for tool, rule in rules.items()}
    return {tool: nbytes for tool, nbytes in told.items() if nbytes is not None}


def _accelerate_training(case: Case, _: Row) -> int | None:
    """huggingface/accelerate@16cb6eb8, commands/estimate.py, "Training using Adam": 4 x the weights."""
    weights = case.recipe.precision.weights
    if case.writing is not None or weights not in _BYTES:
        return None
    return 4 * case.spec.num_parameters * _BYTES[weights]


def _accelerate_inference(case: Case, _: Row) -> int | None:
    """Its documentation (docs/source/usage_guides): "add up to an additional 20%" for inference."""
    weights = case.recipe.precision.weights
    if case.writing is None or weights not in _BYTES:
        return None
    return int(1.2 * case.spec.num_parameters * _BYTES[weights])


def _deepspeed(case: Case, _: Row) -> int | None:
    """deepspeed/runtime/zero/stage_1_and_2.py: 2P + 18P / N."""
    if case.writing is not None:
        return None
    return 2 * case.spec.num_parameters + 18 * case.spec.num_parameters // case.recipe.parallel.devices


def _llm_analysis(case: Case, _: Row) -> int | None:
    """cli99/llm-analysis@08d7f8f6, llm_analysis/analysis.py: weights, FP32 gradients, FP32 weights and two moments, all
    divided; activations of FlashAttention's layer with dropout (or its input, recomputed) and the logits. Full training
    only."""
    recipe, shape = case.recipe, _shape(case)
    if case.writing is not None or shape is None or not recipe.trains_weights:
        return None
    held = case.spec.num_parameters * (_BYTES[recipe.precision.weights] + 4 + 12) // recipe.parallel.devices
    tokens = recipe.micro_batch_size * recipe.seq_len
    attention = (7 * shape.hidden + 4 * shape.heads) * 2 + shape.hidden
    feed_forward = 2 * shape.hidden + 4 * shape.inner
    layer = attention + feed_forward + 2 * 4 * shape.hidden
    if recipe.memory.activation_checkpointing == "full":
        layer = 2 * shape.hidden
    return held + tokens * (shape.layers * layer + 2 * shape.vocab)


def _unsloth(case: Case, row: Row) -> int | None:
    """unslothai/unsloth@04f95609, studio/backend/utils/hardware/VRAM_ESTIMATION.md. One device, LoRA on the seven
    projections that the row adapts."""
    recipe, shape = case.recipe, _shape(case)
    if case.writing is not None or shape is None or recipe.parallel.devices > 1:
        return None
    projections = _projections(shape)
    mlp = 3 * shape.hidden * shape.inner * shape.experts
    quantizable = shape.layers * (mlp + sum(_matrix(shape, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")))
    quantized_bytes = quantizable * 2 / (3.6 if recipe.precision.double_quant else 3.2)
    others = case.spec.num_parameters - quantizable
    weights = 2 * others + (quantized_bytes if recipe.precision.packed else 2 * quantizable)
    trainable = case.spec.num_parameters
    if recipe.adapts:
        names = list(projections) if recipe.lora.targets == ("all-linear",) else recipe.lora.targets
        trainable = recipe.lora.rank * shape.layers * sum(sum(projections.get(name, (0, 0))) for name in names)
    optimizer = trainable * {"adamw8bit": 4, "sgd": 4}.get(recipe.optimizer.name, 6)
    tokens = recipe.micro_batch_size * recipe.seq_len
    layer = 2.5 * tokens * (shape.hidden + 2 * shape.keys + 2 + 2 * shape.inner)
    layers = shape.layers if recipe.memory.activation_checkpointing == "none" else 1 if recipe.adapts else 2
    activations = layer * layers
    floor = 0.15 * weights
    if recipe.adapts:
        floor = min(floor, max(activations, optimizer))
    adapters = 2 * trainable if recipe.adapts else 0
    return int(weights + adapters + optimizer + max(2 * trainable, floor) + activations + _flat(row, 1.4))


def _vramcalc(case: Case, row: Row) -> int | None:
    """PyPI vramcalc 0.1.2, memory.py and estimate.py: one device, no packed weights, LoRA on q, k, v and o."""
    recipe, shape = case.recipe, _shape(case)
    if shape is None or shape.experts > 1 or recipe.parallel.devices > 1 or recipe.precision.packed:
        return None
    parameters, stored = case.spec.num_parameters, _BYTES[recipe.precision.weights]
    if case.writing is not None:
        tokens = case.writing.batch_size * case.writing.context
        cache = 2 * shape.layers * tokens * shape.keys * stored
        return parameters * stored + cache + tokens * (shape.vocab + 2 * shape.hidden) * stored + _flat(row, 0.75)
    width = _BYTES[recipe.precision.compute]
    rank = recipe.lora.rank
    trainable, state = parameters, stored
    if recipe.adapts:
        trainable = shape.layers * rank * (4 * shape.hidden + 2 * shape.query + 2 * shape.keys)
        state = 4
    weights = parameters * stored + (4 * trainable if recipe.adapts else 0)
    activations = _vramcalc_activations(case, shape, width, flash=row["attention"].startswith("flash"))
    cast = 0
    if width < stored:
        cast = (parameters - shape.vocab * shape.hidden * (0 if case.spec.tied_head else 1)) * width
        if recipe.adapts and recipe.memory.activation_checkpointing == "full":
            cast //= shape.layers
    return weights + 3 * trainable * state + max(activations + cast, trainable * state) + _flat(row, 0.75)


def _vramcalc_activations(case: Case, shape: Shape, width: int, *, flash: bool) -> int:
    recipe = case.recipe
    tokens = recipe.micro_batch_size * recipe.seq_len
    elements = 5 * shape.hidden + 2 * shape.query + 2 * shape.keys + 4 * shape.inner
    if not flash and shape.keys < shape.query:
        elements += 2 * shape.query
    if recipe.memory.attention == "eager":
        elements += shape.heads * recipe.seq_len * (width + 4) // width
    norms = 2 * 4 * shape.hidden
    adapters = 4 * shape.layers * recipe.lora.rank * 4 if recipe.adapts else 0
    kept = shape.layers * (elements * width + norms)
    if recipe.memory.activation_checkpointing == "full":
        kept = shape.layers * shape.hidden * width + elements * width + norms
    return tokens * (kept + adapters + shape.vocab * (width + 12))


def _shape(case: Case) -> Shape | None:
    config = case.spec.config
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if case.recipe.task != "causal-lm" or any(config.get(key) is None for key in needed):
        return None
    hidden, layers, heads, inner, vocab = (int(config[key]) for key in needed)
    head = int(config.get("head_dim") or hidden // heads)
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        query=head * heads,
        keys=head * int(config.get("num_key_value_heads") or heads),
        inner=inner,
        vocab=vocab,
        experts=int(config.get("num_local_experts") or config.get("num_experts") or 1),
    )


def _projections(shape: Shape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs."""
    return {
        "q_proj": (shape.hidden, shape.query),
        "k_proj": (shape.hidden, shape.keys),
        "v_proj": (shape.hidden, shape.keys),
        "o_proj": (shape.query, shape.hidden),
        "gate_proj": (shape.hidden, shape.inner),
        "up_proj": (shape.hidden, shape.inner),
        "down_proj": (shape.inner, shape.hidden),
    }


def _matrix(shape: Shape, name: str) -> int:
    inputs, outputs = _projections(shape)[name]
    return inputs * outputs


def _flat(row: Row, gigabytes: float) -> int:
    return int(gigabytes * _GB) if row["memory_kind"] in ("nvidia-smi", "unspecified") else 0
