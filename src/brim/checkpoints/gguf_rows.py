"""What becomes of each tensor of a model in a GGUF file."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from brim.checkpoints.block_rows import WORK_BYTES, Arrange, encode_block_rows, encode_plain_rows
from brim.checkpoints.conversion import Conversion
from brim.checkpoints.layouts import gguf
from brim.checkpoints.layouts.gguf_vocabulary import add_vocabulary
from brim.checkpoints.writer import OutputFile
from brim.models.directory import StoredTensor
from brim.models.quiet import quiet_transformers
from brim.models.spec import ModelSpec, TensorSpec
from brim.numerics.encode import TORCH_DTYPES
from brim.numerics.formats import FORMATS
from brim.numerics.ggml_blocks import BLOCK

_TABLES = ("token_embd.weight", "output.weight")
_FINER: Mapping[str, str] = {"q4_0": "q8_0"}
"""What embedding and head become: llama.cpp keeps them finer than the rest as well."""


def plan_gguf(
    source: Path, spec: ModelSpec, config: Mapping[str, Any], stored: Sequence[StoredTensor], *, to: str
) -> tuple[tuple[Conversion, ...], OutputFile]:
    """Matrices become `to`; vectors FP32, which llama.cpp wants. Raises UsageError for families without a row."""
    architecture = gguf.architecture_of(spec)
    dimensions = _dimensions(config)
    file_name = gguf.file_name_of(architecture, dimensions["num_hidden_layers"])
    # Tables of angles, which old checkpoints hold, and a head that is the embedding are made anew by readers.
    wanted = [
        tensor
        for tensor in stored
        if not tensor.spec.name.endswith("rotary_emb.inv_freq")
        and not (tensor.spec.name == "lm_head.weight" and dimensions["tie_word_embeddings"])
    ]
    conversions = tuple(
        _conversion(tensor, file_name(tensor.spec.name), architecture, dimensions, to) for tensor in wanted
    )
    file = gguf.gguf_file(
        spec,
        architecture,
        [conversion.outputs[0] for conversion in conversions],
        to=to,
        dimensions=dimensions,
        vocabulary=lambda writer: add_vocabulary(writer, source, dimensions["vocab_size"]),
    )
    return conversions, file


def _dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what transformers takes for what it does not say."""
    with quiet_transformers():
        full = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"})
    facts = full.to_dict()
    rotary = facts.get("rope_parameters") or {}
    rotary = rotary.get("full_attention", rotary)  # Gemma 3 has one for each kind of layer
    heads = facts["num_attention_heads"]
    facts["rope_theta"] = rotary.get("rope_theta", facts.get("rope_theta", 10000.0))
    facts["head_dim"] = facts.get("head_dim") or facts["hidden_size"] // heads
    facts["num_key_value_heads"] = facts.get("num_key_value_heads") or heads
    facts["tie_word_embeddings"] = full.tie_word_embeddings
    return facts


def _conversion(
    tensor: StoredTensor, name: str, architecture: gguf.Architecture, dimensions: Mapping[str, Any], to: str
) -> Conversion:
    spec, row = tensor.spec, tensor.spec.shape[-1] if tensor.spec.shape else 1
    arrange, together = _as_it_is, row
    if architecture.paired_rotary and (".attn_q." in name or ".attn_k." in name):
        # Heads are whole in each block, so their rows can be put in another order as they are encoded.
        rows = dimensions["head_dim"] * (row if len(spec.shape) > 1 else 1)
        arrange, together = partial(_in_pairs, head_dim=dimensions["head_dim"]), rows
    format = _format(spec, name, to)
    output = TensorSpec(name=name, shape=spec.shape, dtype=format, nbytes=FORMATS[format].nbytes(spec.numel))
    row_bytes = (output.nbytes * together // max(1, spec.numel),)
    shaped = partial(_arranged, row=row if len(spec.shape) > 1 else 1, arrange=arrange)
    if format in ("q8_0", "q4_0"):
        encode = partial(encode_block_rows, format=format, arrange=shaped)
        return Conversion(
            source=tensor, outputs=(output,), encode=encode, row_elements=together, row_bytes=row_bytes,
            work_bytes=WORK_BYTES,
        )  # fmt: skip
    offset = architecture.norm_offset if "norm" in name else 0.0
    plain = partial(encode_plain_rows, dtype=TORCH_DTYPES[format], arrange=shaped, offset=offset)
    return Conversion(
        source=tensor, outputs=(output,), encode=plain, row_elements=together, row_bytes=row_bytes,
        work_bytes=WORK_BYTES,
    )  # fmt: skip


def _format(spec: TensorSpec, name: str, to: str) -> str:
    if len(spec.shape) < 2:
        return "fp32"
    wanted = _FINER.get(to, to) if name in _TABLES else to
    blocks = wanted in ("q8_0", "q4_0")
    return "fp16" if blocks and spec.shape[-1] % BLOCK else wanted


def _arranged(block: Tensor, *, row: int, arrange: Arrange) -> Tensor:
    return arrange(block.reshape(-1, row))


def _as_it_is(rows_RK: Tensor) -> Tensor:
    return rows_RK


def _in_pairs(rows_RK: Tensor, *, head_dim: int) -> Tensor:
    """Of each head the rows i and i + D/2, which are rotated together, become neighbours."""
    halves = rows_RK.view(-1, 2, head_dim // 2, rows_RK.shape[-1])
    return halves.transpose(1, 2).reshape(rows_RK.shape)
