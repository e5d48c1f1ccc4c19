"""Models whose weights stay packed: as their files hold them (`StoredWeights`), or packed as they are read (`PackAll`).

A linear layer stays packed where its file holds codes and scales in a form that `layers.packing` knows:
compressed-tensors' int-quantized, pack-quantized and float-quantized, bitsandbytes' INT8 and its NF4 without nested
scales, torchao's INT8. What the files hold decides, not the patterns in their config, which may be any expression.
"""

from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationConfigMixin

from brim.errors import UsageError
from brim.layers.experts import are_packable
from brim.layers.linears import linears_below
from brim.layers.one_token import prepare_one_token
from brim.layers.packed_embedding import PackedEmbedding, tie
from brim.layers.packed_linear import PackedLinear
from brim.layers.packed_loading import loading
from brim.layers.packed_model import fill, packed_module
from brim.layers.packing import Fp8, Int4, Int8, Int8Absmax, Int8Shifted, Int8Words, Nf4, Packing
from brim.layers.swap import swap
from brim.models import ModelSpec
from brim.models.quiet import quiet_transformers
from brim.models.read_weights import read_linears
from brim.models.skeleton import DTYPES, skeleton
from brim.models.spec import TensorSpec
from brim.numerics.formats import FORMATS as NUMBER_FORMATS

FORMATS = ("int8", "w8a8", "int4", "nf4")
"""What weights can be packed in as they are read."""
NF4_BLOCK = NUMBER_FORMATS["nf4"].block
_GROUPS = (128, 64, 32)
_RENAMED = {
    "weight_scale": "scale", "weight_packed": "weight", "weight.absmax": "absmax", "weight.quant_map": "code",
    "SCB": "absmax", "_weight_qdata": "weight", "_weight_scale": "scale", "_weight_zero_point": "zero",
}  # fmt: skip
_SCALES = (".weight_scale", ".weight.absmax", ".SCB", "._weight_scale")


class StoredWeights:
    """Modules that hold what their file holds."""

    renamed: Mapping[str, str] = _RENAMED

    def __init__(self, packings: Mapping[str, Packing], compute: torch.dtype, *, tied: bool) -> None:
        self.packings, self.compute, self.tied = packings, compute, tied

    def swap(self, model: PreTrainedModel) -> None:
        names = {id(module): name for name, module in model.named_modules()}

        def make(module: nn.Module) -> nn.Module:
            packing = self.packings[names[id(module)]]
            if isinstance(module, nn.Embedding):
                return _embedding(module, packing, self.compute)
            layer = packed_module(module, packing=packing, compute=self.compute)
            assert isinstance(layer, PackedLinear)
            layer.is_stored_packed = layer._is_hf_initialized = True
            return layer

        swap(model, match=lambda name, _: name in self.packings, make=make)
        embedding = model.get_input_embeddings()
        if self.tied and isinstance(embedding, PackedEmbedding):
            _tie_later(model, model.get_output_embeddings(), embedding)

    def fill(self, model: PreTrainedModel) -> None:
        fill(model)

    def finish(self, model: PreTrainedModel) -> None:
        """A head that is the embedding holds what it holds; all else is as the file has it."""
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if isinstance(embedding, PackedEmbedding) and isinstance(head, PackedLinear) and head.is_tied:
            tie(head, embedding)

    def loading(self) -> QuantizationConfigMixin:
        return loading(self)


class PackAll:
    """Linear layers and experts in one format; embedding and head in INT8 by row, together where they are tied.

    `stored`: modules that their file holds packed already, which stay as they are.
    Left alone: what the family keeps in FP32, embeddings that are not plain, and an encoder-decoder's embeddings.
    """

    def __init__(self, format: str, compute: torch.dtype, *, tied: bool, stored: StoredWeights | None = None) -> None:
        self.format, self.compute, self.tied = format, compute, tied
        self._stored = stored or StoredWeights({}, compute, tied=tied)
        self.renamed: Mapping[str, str] = self._stored.renamed if stored else {}

    def swap(self, model: PreTrainedModel) -> None:
        self._stored.swap(model)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        kept, below = set(model._keep_in_fp32_modules or ()), linears_below(head, model)
        read = set(read_linears(model))

        def match(name: str, module: nn.Module) -> bool:
            packs = below(name, module) or are_packable(module)
            return packs and name not in read and not kept & set(name.split("."))

        swap(model, match=match, make=self._packed)
        if type(embedding) is nn.Embedding and type(head) is nn.Linear and not model.config.is_encoder_decoder:
            self._swap_ends(model, embedding, head)

    def _packed(self, module: nn.Module) -> nn.Module:
        return packed_module(module, packing=packing_of(self.format, _inputs(module)), compute=self.compute)

    def _swap_ends(self, model: PreTrainedModel, embedding: nn.Embedding, head: nn.Linear) -> None:
        rows, hidden = embedding.weight.shape
        packed = PackedEmbedding(rows, hidden, compute=self.compute, device=embedding.weight.device)
        packed._is_hf_initialized = True
        model.set_input_embeddings(packed)
        if self.tied:
            _tie_later(model, head, packed)
            return
        packed_head = packed_module(head, packing=Int8(), compute=self.compute)
        assert isinstance(packed_head, PackedLinear)
        packed_head._is_hf_initialized = True
        model.set_output_embeddings(packed_head)

    def fill(self, model: PreTrainedModel) -> None:
        fill(model)
        self.finish(model)

    def finish(self, model: PreTrainedModel) -> None:
        self._stored.finish(model)

    def loading(self) -> QuantizationConfigMixin:
        return loading(self)


def _embedding(module: nn.Embedding, packing: Packing, compute: torch.dtype) -> PackedEmbedding:
    assert isinstance(packing, Int8)
    rows, hidden = module.weight.shape
    layer = PackedEmbedding(rows, hidden, compute=compute, device=module.weight.device, packing=packing)
    layer.is_stored_packed = layer._is_hf_initialized = True
    return layer


def _tie_later(model: PreTrainedModel, head: nn.Module, embedding: PackedEmbedding) -> None:
    """A packed head that has nothing of its own: transformers ties parameters alone, and is to miss nothing of the
    head's, so `finish` ties codes and scales."""
    packed = packed_module(head, packing=embedding.packing, compute=embedding.compute)
    assert isinstance(packed, PackedLinear)
    packed._is_hf_initialized = True
    packed.is_tied = True
    packed._non_persistent_buffers_set.update(packed.held)
    model.set_output_embeddings(packed)
    model.all_tied_weights_keys = {}


def rearrange(model: nn.Module) -> None:
    """Each weight in the order of its device's kernel, one after the other, and ready for one token at a time."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.rearrange()
    prepare_one_token(model)


def settle(model: nn.Module) -> None:
    """Each weight as devices hold it that have no kernel for the order of a CPU."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.settle()


def packing_of(format: str, inputs: int) -> Packing:
    """How this format holds weights of so many inputs. Raises UsageError for one that is not packed."""
    match format:
        case "int8":
            return Int8()
        case "w8a8":
            return Int8(rounds_inputs=True)
        case "nf4":
            return Nf4(nested=False)
        case "int4":
            group = next((size for size in _GROUPS if inputs % size == 0), None)
            return Int8() if group is None else Int4(group_size=group)
        case _:
            raise UsageError(f"weights are not packed as {format!r} when they are read; formats: {', '.join(FORMATS)}")


def packer_of(
    spec: ModelSpec, *, pack: str | None = None, compute: torch.dtype | None = None
) -> StoredWeights | PackAll | None:
    """What packs this model's weights; None where nothing of it is packed, in its files or by wish.

    `compute`: None: the dtype of the config, or of the scales. Raises UsageError for an unknown format.
    """
    if pack is not None and pack not in FORMATS:
        packing_of(pack, 0)
    packings = stored_packings(spec)
    if packings is None and pack is None:
        return None
    if packings is None and spec.config.get("quantization_config"):
        raise UsageError(
            f"{spec.name} is quantized in a form that is unpacked as it is read, and cannot be packed as {pack}; "
            "name the model that it was made from"
        )
    dtype = compute or _made_for(spec)
    stored = None if packings is None else StoredWeights(packings, dtype, tied=spec.tied_head)
    return stored if pack is None else PackAll(pack, dtype, tied=spec.tied_head, stored=stored)


def _made_for(spec: ModelSpec) -> torch.dtype:
    named = spec.config.get("dtype") or spec.config.get("torch_dtype")
    by_name = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if isinstance(named, str) and named in by_name:
        return by_name[named]
    return DTYPES[next((tensor.dtype for tensor in spec.tensors if tensor.dtype in DTYPES), "fp32")]


def stored_packings(spec: ModelSpec) -> dict[str, Packing] | None:
    """Linear module of the model -> how the files hold its weight, by their headers; None where they hold none packed,
    or one that stays packed in no module of ours.
    """
    tensors = {tensor.name: tensor for tensor in spec.tensors}
    ends = {name: end for name in tensors for end in _SCALES if name.endswith(end)}
    scales = {f"{name.removesuffix(end)}.weight" for name, end in ends.items()}
    if not scales:
        return None
    with torch.device("meta"), quiet_transformers():
        model = skeleton(spec, dtype="bf16", attention="eager")
    prefix = f"{model.base_model_prefix}."
    kept = set(model._keep_in_fp32_modules or ())
    found: dict[str, Packing] = {}
    for name, module in model.named_modules():
        for weight in (f"{own}.weight" for own in (name, name.removeprefix(prefix), prefix + name)):
            if type(module) in (nn.Linear, nn.Embedding) and weight in scales:
                packing = _packing_in_file(weight, tensors, *module.weight.shape)
                if isinstance(module, nn.Embedding) and not isinstance(packing, Int8):
                    return None
                # T5 casts the inputs of what it keeps in FP32 to the dtype of its codes, unless they are INT8
                if packing is None or (kept & set(name.split(".")) and not isinstance(packing, Int8)):
                    return None
                found[name] = packing
                scales.discard(weight)
    return None if scales else found


def _packing_in_file(weight: str, tensors: Mapping[str, TensorSpec], rows: int, inputs: int) -> Packing | None:
    if (packing := _int8_of_others(weight.removesuffix(".weight"), tensors, rows, inputs)) is not None:
        return packing
    scale, whole, words, absmax = (tensors.get(weight + end) for end in ("_scale", "", "_packed", ".absmax"))
    if absmax is not None and whole is not None:
        is_nf4 = f"{weight}.quant_state.bitsandbytes__nf4" in tensors and f"{weight}.nested_absmax" not in tensors
        fits = whole.nbytes == rows * inputs // 2 and absmax.shape == (rows * inputs // NF4_BLOCK,)
        return Nf4(nested=False) if is_nf4 and fits else None
    if scale is None or len(scale.shape) != 2 or scale.shape[0] != rows or inputs % max(1, scale.shape[1]):
        return None
    if f"{weight}_zero_point" in tensors or f"{weight}_g_idx" in tensors:
        return None
    group = inputs // scale.shape[1]
    by_row = group == inputs
    if whole is not None and whole.shape == (rows, inputs) and (by_row or whole.dtype == "int8"):
        known: dict[str, Packing] = {"int8": Int8(group_size=None if by_row else group), "fp8_e4m3": Fp8()}
        return known.get(whole.dtype)
    if words is not None and words.shape == (rows, inputs // 8) and inputs % 8 == 0:
        return Int4(group_size=group)
    if words is not None and words.shape == (rows, inputs // 4) and inputs % 4 == 0:
        return Int8Words(group_size=None if by_row else group)
    return None


def _int8_of_others(name: str, tensors: Mapping[str, TensorSpec], rows: int, inputs: int) -> Packing | None:
    """bitsandbytes' or torchao's, of the module of this name."""
    absmax, codes = tensors.get(f"{name}.SCB"), tensors.get(f"{name}.weight")
    if absmax is not None and codes is not None and codes.dtype == "int8":
        return Int8Absmax() if (codes.shape, absmax.shape) == ((rows, inputs), (rows,)) else None
    codes, scale = tensors.get(f"{name}._weight_qdata"), tensors.get(f"{name}._weight_scale")
    if codes is None or scale is None or codes.dtype != "int8" or codes.shape != (rows, inputs):
        return None
    if len(scale.shape) != 2 or scale.shape[0] != rows or not scale.shape[1] or inputs % scale.shape[1]:
        return None
    group = None if scale.shape[1] == 1 else inputs // scale.shape[1]
    zero = tensors.get(f"{name}._weight_zero_point")
    if zero is None:
        return Int8(group_size=group)
    return Int8Shifted(group_size=group) if (zero.shape, zero.dtype) == (scale.shape, "int8") else None


def _inputs(module: Any) -> int:
    """Of its matrices; for experts what divides the inputs of all."""
    if are_packable(module):
        _, hidden, intermediate = module.down_proj.shape
        return gcd(hidden, intermediate)
    return int(module.nx if isinstance(module, Conv1D) else module.in_features)
