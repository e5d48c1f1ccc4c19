"""GGUF: one file that has the weights, what config.json says, and the tokenizer. Names and metadata by gguf-py.

The file's front is made by `gguf.GGUFWriter`, which knows keys, types and packing; the tensors' bytes are streamed to
their places behind it (the writer would want them in order, one whole tensor at a time).
Read by llama.cpp and by transformers (`gguf_file=`), which decodes to dense weights on a CPU.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from brim.checkpoints.writer import OutputFile
from brim.errors import UsageError
from brim.models.gguf_header import BLOCKS
from brim.models.spec import ModelSpec, TensorSpec

LAYOUT = "gguf"
NAME = "model.gguf"
_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_TYPES = {name: number for number, (name, _, _) in BLOCKS.items()}
_FILE_TYPES = {
    "fp32": gguf.LlamaFileType.ALL_F32,
    "fp16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How GGUF names a family, and what its readers take for granted."""

    name: str
    paired_rotary: bool = False
    """Readers rotate neighbours, so rows of queries and keys go in pairs; elsewhere halves of a head are rotated."""
    norm_offset: float = 0.0
    """Added to the weights of norms: the file has what the norm multiplies by, the model that less 1."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(name="llama", paired_rotary=True),
    "mistral": Architecture(name="llama", paired_rotary=True),
    "qwen2": Architecture(name="qwen2"),
    "qwen3": Architecture(name="qwen3"),
    "gemma3_text": Architecture(name="gemma3", norm_offset=1.0),
}
"""By transformers' model_type. Those whose files transformers reads back to the same logits; a test holds each."""


def architecture_of(spec: ModelSpec) -> Architecture:
    """Raises UsageError for a family without a row, and for what transformers would not find in the file's metadata."""
    if spec.model_type not in ARCHITECTURES:
        raise UsageError(
            f"{spec.name} is {spec.model_type}, which is not written as GGUF (families: {', '.join(ARCHITECTURES)}); "
            "use --to int8 or int4, whose layouts hold any family's linear layers"
        )
    architecture = ARCHITECTURES[spec.model_type]
    if lost := _unsaid(spec, architecture):
        raise UsageError(
            f"{spec.name} {lost}, which transformers does not read back from a GGUF file; use --to int8 or int4"
        )
    return architecture


def _unsaid(spec: ModelSpec, architecture: Architecture) -> str | None:
    """What a reader would take for another model's: in silence, so it is better not written."""
    kinds: list[Mapping[str, Any]] = []
    for rotary in (spec.config.get("rope_parameters") or {}, spec.config.get("rope_scaling") or {}):
        kinds += [entry for entry in rotary.values() if isinstance(entry, dict)] or [rotary]  # one a kind of layer
    if odd := [kind for kind in (_rotary_kind(entry) for entry in kinds) if kind != "default"]:
        return f"stretches its positions ({odd[0]})"
    if architecture.name != "llama":
        return None
    if spec.config.get("attention_bias") or spec.config.get("mlp_bias"):
        return "has biases in its linear layers"
    return "attends to a window" if spec.config.get("sliding_window") else None


def _rotary_kind(entry: Mapping[str, Any]) -> str:
    return str(entry.get("rope_type") or entry.get("type") or "default")


def file_name_of(architecture: Architecture, num_layers: int) -> Callable[[str], str]:
    """A tensor's name in the model -> its name in the file. Raises UsageError for one that GGUF has no name for."""
    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(kind, num_layers)

    def file_name(name: str) -> str:
        found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
        # A model saved without its head lacks the prefix.
        found = found or names.get_name(f"model.{name}", try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UsageError(f"tensor {name!r} has no name in GGUF's {architecture.name}; use --to int8 or int4")
        return found

    return file_name


def gguf_file(
    spec: ModelSpec,
    architecture: Architecture,
    tensors: Sequence[TensorSpec],
    *,
    to: str,
    dimensions: Mapping[str, Any],
    vocabulary: Callable[[gguf.GGUFWriter], None],
) -> OutputFile:
    """The file with these tensors; `dimensions` is what the config comes to, `vocabulary` writes the tokenizer."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / NAME
        writer = gguf.GGUFWriter(path, architecture.name)
        writer.add_type(gguf.GGUFType.MODEL)
        name = spec.path.resolve().name if spec.path else spec.name
        if "mistral" not in name.lower():
            # transformers 5.23 takes a file of that name for an architecture of its own, which it then does not know.
            writer.add_name(name)
        writer.add_file_type(_FILE_TYPES[to])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_dimensions(writer, dimensions)
        vocabulary(writer)
        for tensor in tensors:
            raw = gguf.GGMLQuantizationType(_TYPES[tensor.dtype])
            # Any dtype but uint8, which the writer would take for bytes of blocks: `raw` counts.
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    header += bytes(-len(header) % _ALIGNMENT)
    return OutputFile(NAME, tuple(tensors), header, _places(tensors, len(header)), alignment=_ALIGNMENT)


def _add_dimensions(writer: gguf.GGUFWriter, dimensions: Mapping[str, Any]) -> None:
    writer.add_vocab_size(dimensions["vocab_size"])
    writer.add_context_length(dimensions["max_position_embeddings"])
    writer.add_embedding_length(dimensions["hidden_size"])
    writer.add_block_count(dimensions["num_hidden_layers"])
    writer.add_feed_forward_length(dimensions["intermediate_size"])
    writer.add_head_count(dimensions["num_attention_heads"])
    writer.add_head_count_kv(dimensions["num_key_value_heads"])
    writer.add_key_length(dimensions["head_dim"])
    writer.add_value_length(dimensions["head_dim"])
    writer.add_rope_dimension_count(dimensions["head_dim"])
    writer.add_rope_freq_base(dimensions["rope_theta"])
    writer.add_layer_norm_rms_eps(dimensions["rms_norm_eps"])
    if window := dimensions.get("sliding_window"):
        writer.add_sliding_window(window)


def _places(tensors: Iterable[TensorSpec], begin: int) -> dict[str, int]:
    places = {}
    for tensor in tensors:
        places[tensor.name] = begin
        begin += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places
