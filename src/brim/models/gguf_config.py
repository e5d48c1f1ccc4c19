"""A Hugging Face config from the metadata of a GGUF file: the same facts under transformers' names.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what the metadata leave unsaid (Gemma 3's pattern of
layers) is as in llama.cpp's src/llama-model.cpp.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brim.errors import ModelFileError, UnknownNameError
from brim.models.gguf_header import GgufHeader, Value

_ROWS: Mapping[str, tuple[str, str]] = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
"""GGUF architecture -> (transformers' model_type, its class)."""
_TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding", "unk_token_id": "unknown"}
_GEMMA3_PATTERN = 6
"""Every sixth layer of Gemma 3 attends to everything, the others to a window."""
_GEMMA3_27B_LAYERS = 62


def config_from_gguf(header: GgufHeader, *, where: Path) -> dict[str, Any]:
    """The config of the model in this file. Raises UnknownNameError for an architecture without a row here."""
    architecture = str(header.metadata.get("general.architecture", ""))
    if architecture not in _ROWS or header.metadata.get(f"{architecture}.expert_count"):
        raise UnknownNameError(
            f"{where}: GGUF architecture {architecture!r} is not known (known: {', '.join(_ROWS)}, without experts); "
            "use the model's Hugging Face form"
        )
    metadata = {key.removeprefix(f"{architecture}."): value for key, value in header.metadata.items()}
    model_type, class_name = _ROWS[architecture]
    config = {"architectures": [class_name], "model_type": model_type} | _dimensions(metadata, header, where)
    config |= {"tie_word_embeddings": "output.weight" not in _shapes(header), "dtype": "float32"}
    for key, word in _TOKEN_IDS.items():
        if isinstance(token := metadata.get(f"tokenizer.ggml.{word}_token_id"), int):
            config[key] = token
    return config | (_gemma3(config, metadata) if architecture == "gemma3" else _llama_like(architecture, header))


def _dimensions(metadata: Mapping[str, Value], header: GgufHeader, where: Path) -> dict[str, Any]:
    def number(key: str) -> int:
        value = metadata.get(key)
        if type(value) is not int or not 0 < value < 2**31:
            raise ModelFileError(f"{where}: metadata {key!r} is {value!r}, which is not a size; the file is incomplete")
        return value

    embedding = _shapes(header).get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise ModelFileError(f"{where} has no token_embd.weight of two dimensions; the file is incomplete")
    hidden, heads = number("embedding_length"), number("attention.head_count")
    epsilon = metadata.get("attention.layer_norm_rms_epsilon", 1e-6)
    return {
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv") if "attention.head_count_kv" in metadata else heads,
        "head_dim": number("attention.key_length") if "attention.key_length" in metadata else hidden // heads,
        "vocab_size": embedding[0],
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": _decimal(epsilon),
        "rope_theta": _decimal(metadata.get("rope.freq_base", 10000.0)),
        **_rope_scaling(metadata),
    }


def _rope_scaling(metadata: Mapping[str, Value]) -> dict[str, Any]:
    kind = metadata.get("rope.scaling.type", "none")
    if kind == "none" or "rope.scaling.factor" not in metadata:
        return {}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _decimal(metadata["rope.scaling.factor"])}
    if "rope.scaling.original_context_length" in metadata:
        scaling["original_max_position_embeddings"] = metadata["rope.scaling.original_context_length"]
    return {"rope_scaling": scaling}


def _llama_like(architecture: str, header: GgufHeader) -> dict[str, Any]:
    shared = {"hidden_act": "silu"}
    if architecture == "llama":
        return shared | {"attention_bias": "blk.0.attn_q.bias" in _shapes(header), "mlp_bias": False}
    return shared


def _gemma3(config: Mapping[str, Any], metadata: Mapping[str, Value]) -> dict[str, Any]:
    layers = int(config["num_hidden_layers"])
    is_27b = layers == _GEMMA3_27B_LAYERS
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": per_head if is_27b else config["head_dim"],
        "sliding_window": metadata.get("attention.sliding_window", 512),
        "layer_types": [
            "sliding_attention" if (layer + 1) % _GEMMA3_PATTERN else "full_attention" for layer in range(layers)
        ],
        "rope_theta": _decimal(metadata.get("rope.freq_base", 1e6)),
        "rope_local_base_freq": 10000.0,
    }


def _shapes(header: GgufHeader) -> dict[str, tuple[int, ...]]:
    return {entry.spec.name: entry.spec.shape for entry in header.tensors}


def _decimal(value: Value) -> float:
    """The shortest decimal that FP32, GGUF's float, rounds to this value: 1e-05 for 9.999999747378752e-06."""
    number = float(value) if isinstance(value, int | float) else 0.0
    for digits in range(1, 10):
        if struct.pack("<f", short := float(f"{number:.{digits}g}")) == struct.pack("<f", number):
            return short
    return number
