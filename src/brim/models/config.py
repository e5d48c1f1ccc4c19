"""Reads a Hugging Face `config.json`, and says from it and from the file headers what a model holds."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from brim.errors import ModelFileError
from brim.models.files import read_json_object
from brim.models.spec import TensorSpec

MAX_CONFIG_BYTES = 16 * 2**20
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""Names of an output head of its own, in safetensors (transformers, GPT-NeoX) and GGUF."""
_EMBEDDINGS = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "shared.weight",
    "gpt_neox.embed_in.weight",
    "transformer.word_embeddings.weight",
    "model.decoder.embed_tokens.weight",
)
_COPIES_OF_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_BUFFER_ENDINGS = (
    ".inv_freq",
    ".masked_bias",
    ".position_ids",
    # Scales and the like of quantized layouts: they belong to a parameter and are none themselves.
    "_scale",
    "_zero_point",
    ".SCB",
    ".weight_format",
    ".weight_shape",
    "rope_freqs.weight",
)

_PACKED_ENDINGS = (".weight_packed", ".qweight", ".weight.quant_map", "_blocks")


def read_config(path: Path) -> dict[str, Any]:
    """The text model's configuration in this `config.json`. Raises ModelFileError.

    A multimodal model nests it in `text_config`; what it leaves out (its head, its dtype) is taken from around it.
    """
    return text_config(read_json_object(path, max_bytes=MAX_CONFIG_BYTES), where=path)


def text_config(config: Mapping[str, Any], *, where: object) -> dict[str, Any]:
    """The part of a configuration that describes the text model, checked. Raises ModelFileError."""
    nested = config.get("text_config")
    if isinstance(nested, dict) and nested.get("model_type"):
        around = {key: config[key] for key in ("tie_word_embeddings", "dtype", "torch_dtype") if key in config}
        return text_config(around | nested, where=where)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelFileError(f"{where} names no model_type, so nobody can tell what model this is; add it, or use the "
                             "config.json that was saved with the model")  # fmt: skip
    return dict(config)


def head_and_embedding(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The names under which these tensors hold an output head and the input embedding; None for what is not there."""
    known = set(names)
    head = next((name for name in _HEADS if name in known), None)
    return head, next((name for name in _EMBEDDINGS if name in known), None)


def is_packed(tensors: Iterable[TensorSpec]) -> bool:
    """Whether some tensors hold several parameters in one element (4 bit in int32 or uint8)."""
    return any(tensor.name.endswith(_PACKED_ENDINGS) for tensor in tensors)


def count_parameters(tensors: Iterable[TensorSpec], *, tied_head: bool) -> int:
    """Distinct parameters among the tensors of a model's files.

    Files also hold buffers (causal masks, rotary frequencies, scales) and second copies of shared embeddings: neither
    counts. Assumes one stored element per parameter, so packed layouts (4 bit in int32) are not for this.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    copies = set(_HEADS) if tied_head else set()
    if "shared.weight" in by_name:
        copies.update(_COPIES_OF_SHARED)
    return sum(t.numel for name, t in by_name.items() if name not in copies and not _is_buffer(t))


def _is_buffer(tensor: TensorSpec) -> bool:
    # GPT-2 and GPT-NeoX files carry their causal masks as `attn.bias`; a parameter of that name has one dimension.
    is_mask = tensor.name.endswith(".bias") and len(tensor.shape) == 4
    return is_mask or tensor.dtype == "bool" or tensor.name.endswith(_BUFFER_ENDINGS)
