"""compressed-tensors' `pack-quantized` layout: linear weights in a few bits, packed into int32 along each row.

A linear module P holds `P.weight_packed`, int32 (out, words), `P.weight_scale` in the weight's dtype and of shape
(out, in / group), (out, 1) or (1,), and `P.weight_shape`, int64 [out, in]; no `P.weight`. Element i of a row, less the
least code, is at bits [i b, (i + 1) b) of the row's little-endian words; widths that do not divide 32 cross from word
to word (0.20 on). Asymmetric ones have `P.weight_zero_point` too, int32, packed likewise but down each column.
Read by transformers and vLLM (and llama.cpp's converter, by group); config keys as of compressed-tensors 0.20.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from brim.models.spec import TensorSpec
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import Granularity

LAYOUT = "pack-quantized"
PACKED_SUFFIX = "_packed"
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def outputs(weight: TensorSpec, *, format: str, granularity: Granularity) -> tuple[TensorSpec, TensorSpec]:
    """Words and scales of a linear weight. Raises UsageError where groups do not fill a row."""
    rows, inputs = weight.shape
    words = -(-inputs * FORMATS[format].element_bits // 32)
    scale_format = "fp32" if weight.dtype == "fp64" else weight.dtype
    scale_shape = granularity.scale_shape((rows, inputs))
    return (
        TensorSpec(name=weight.name + PACKED_SUFFIX, shape=(rows, words), dtype="int32", nbytes=4 * rows * words),
        TensorSpec(
            name=weight.name + "_scale",
            shape=scale_shape,
            dtype=scale_format,
            nbytes=FORMATS[scale_format].nbytes(prod(scale_shape)),
        ),
    )


def zeros_output(weight: TensorSpec, *, format: str, granularity: Granularity) -> TensorSpec:
    """Words of zero points."""
    rows, groups = granularity.scale_shape((weight.shape[0], weight.shape[1]))
    words = -(-rows * FORMATS[format].element_bits // 32)
    return TensorSpec(name=weight.name + "_zero_point", shape=(words, groups), dtype="int32", nbytes=4 * words * groups)


def shape_tensor(weight: TensorSpec) -> tuple[TensorSpec, bytes]:
    """`P.weight_shape` and its bytes: readers cannot know the last word's unused bits otherwise."""
    spec = TensorSpec(name=weight.name + "_shape", shape=(2,), dtype="int64", nbytes=16)
    return spec, b"".join(size.to_bytes(8, "little") for size in weight.shape)


def tensors(codes_RK: Tensor, scale: Tensor, *, bits: int) -> dict[str, Tensor]:
    """What a module holds, by the name's last part."""
    return {
        "weight_packed": pack(codes_RK, bits=bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes_RK.shape, dtype=torch.int64),
    }


def pack(codes_RK: Tensor, *, bits: int) -> Tensor:
    """int32 words of int8 codes."""
    rows, inputs = codes_RK.shape
    # Wraps around: the codes' least one becomes 0.
    unsigned = codes_RK.contiguous().cpu().numpy().view(np.uint8) + np.uint8(1 << (bits - 1))
    unsigned &= np.uint8((1 << bits) - 1)
    # The two widths that converters write, many times faster than bit by bit.
    if bits == 8 and inputs % 4 == 0:
        return torch.from_numpy(unsigned.view("<i4"))
    if bits == 4 and inputs % 8 == 0:
        pairs = unsigned.view("<u2")  # the later code of two in the upper byte
        return torch.from_numpy((pairs | pairs >> 4).astype(np.uint8).view("<i4"))
    spread = (unsigned[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    row_bytes = np.packbits(spread.reshape(rows, inputs * bits), axis=1, bitorder="little")
    padded = np.pad(row_bytes, ((0, 0), (0, -row_bytes.shape[1] % 4)))
    return torch.from_numpy(padded.view("<i4"))


def pack_zeros(zero_RG: Tensor, *, bits: int) -> Tensor:
    """int32 words of int8 zero points: element i of a column at bits [i b, (i + 1) b) of that column's words."""
    return pack(zero_RG.t().contiguous(), bits=bits).t().contiguous()


class Group(NamedTuple):
    """Linear modules that are stored alike."""

    bits: int
    granularity: str
    """`tensor`, `channel` or `group:32`."""
    targets: tuple[str, ...] = ("Linear",)
    """Names of modules, or of their class: then all but those that are left alone."""
    symmetric: bool = True
    rounds_tokens: bool = False


def config(*, bits: int, granularity: str, ignore: Sequence[str], rounds_tokens: bool = False) -> Mapping[str, Any]:
    """`quantization_config` of config.json; `ignore` names every linear module that was left alone.

    `rounds_tokens`: readers round each token's inputs to INT8, as the model was trained.
    """
    return config_of([Group(bits, granularity, rounds_tokens=rounds_tokens)], ignore=ignore)


def config_of(groups: Sequence[Group], *, ignore: Sequence[str]) -> Mapping[str, Any]:
    """As `config`, of modules that are stored in several ways. llama.cpp's converter reads one group alone."""
    # transformers then makes plain weights of the codes when it loads, as it would at the first use; so T5 loads, too.
    # It takes all dense modules to be of one group there (5.23, get_dense_scheme), so not where there are several.
    # Plain modules would not round their inputs.
    at_once = {"dequantize": True} if len(groups) == 1 and not groups[0].rounds_tokens else {}
    return {
        "quant_method": "compressed-tensors",
        "format": LAYOUT,
        # Without it transformers takes the codes for weights and says nothing.
        "quantization_status": "compressed",
        **at_once,
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {f"group_{number}": _settings(group) for number, group in enumerate(groups)},
    }


def _settings(group: Group) -> Mapping[str, Any]:
    strategy, _, size = group.granularity.partition(":")
    weights: dict[str, Any] = {"num_bits": group.bits, "type": "int", "symmetric": group.symmetric}
    weights |= {"strategy": strategy, "dynamic": False}
    if size:
        weights["group_size"] = int(size)
    return {
        "targets": list(group.targets),
        "weights": weights,
        "input_activations": _TOKENS if group.rounds_tokens else None,
        "output_activations": None,
        "format": LAYOUT,
    }
