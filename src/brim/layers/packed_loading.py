"""transformers' loader made to pack each weight as it reads it, or to take what is packed in the file already.

The loader reads tensor by tensor when it quantizes, and lets others bring their own quantizer: ours packs each weight
as it comes, whatever the family calls it in its files, and experts that are apart there one by one. No full-precision
copy of the model is ever made.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from brim.layers.packed_embedding import PackedEmbedding
from brim.layers.packed_experts import DOWN, GATE_UP, PackedExperts
from brim.layers.packed_linear import PackedLinear

_METHOD = "brim-packed"


class Packer(Protocol):
    """Which modules are packed and how."""

    renamed: Mapping[str, str]
    """Ends of tensors' names in the file -> names of what holds them here."""

    def swap(self, model: PreTrainedModel) -> None:
        """Replace modules of a model that is on the meta device."""

    def finish(self, model: PreTrainedModel) -> None:
        """What is left to do when all tensors are there."""


def loading(packer: Packer) -> QuantizationConfigMixin:
    """What `from_pretrained` takes as `quantization_config`."""
    config = _Config()
    config.packer = packer
    return config


@register_quantization_config(_METHOD)
class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    """Carries the packer through the loader."""

    packer: Packer

    def __init__(self, **_: Any) -> None:
        self.quant_method: Any = _METHOD


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Packs each weight when the loader has read it."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        self.quantization_config.packer.swap(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        self.quantization_config.packer.finish(model)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **settings: Any) -> bool:
        parent, _, name = param_name.rpartition(".")
        module = model.get_submodule(parent)
        if name == "bias" or not isinstance(module, PackedLinear | PackedEmbedding | PackedExperts):
            return False
        return not getattr(module, "is_stored_packed", False)

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack()

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[WeightTransform]:
        merged: list[WeightTransform] = super().update_weight_conversions(weight_conversions, model)
        renamed = self.quantization_config.packer.renamed
        return [
            *(_by_expert(transform) if _merges_experts(transform) else transform for transform in merged),
            *(WeightRenaming(rf"\.{end}$", f".{name}") for end, name in renamed.items()),
        ]

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Pack(ConversionOps):  # type: ignore[misc]
    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **_: Any) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            parent = name.rpartition(".")[0]
            layer = model.get_submodule(parent)
            if isinstance(layer, PackedExperts):
                converted |= _experts(layer, name, _matrices(weight, layer.shapes[name.rpartition(".")[2]][0]))
                continue
            assert isinstance(layer, PackedLinear | PackedEmbedding)
            held = layer.packed(weight)
            layer._is_hf_initialized = True
            # Some are views, and a view keeps its base's memory when its own data is replaced, as `load` does.
            converted |= {f"{parent}.{key}": tensor.clone() for key, tensor in held.items()}
        return converted


class _ByExpert(WeightConverter):  # type: ignore[misc]
    """Experts that are apart in the file: each matrix is read, packed and dropped before the next, none merged."""

    __slots__ = ()

    def convert(self, layer_name: str, model: Any = None, **settings: Any) -> dict[str, Any]:
        layer = model.get_submodule(layer_name.rpartition(".")[0])
        if not isinstance(layer, PackedExperts):
            converted: dict[str, Any] = super().convert(layer_name, model=model, **settings)
            return converted
        reads = [self.collected_tensors.pop(source) for source in self.source_patterns]
        apart = ((e, m, read()) for m, column in enumerate(reads) for e, read in enumerate(column))
        return _experts(layer, layer_name, apart)


def _merges_experts(transform: WeightTransform) -> bool:
    (target, *others) = transform._original_target_patterns
    return isinstance(transform, WeightConverter) and not others and target.endswith((GATE_UP, DOWN))


def _by_expert(converter: WeightConverter) -> _ByExpert:
    copy = _ByExpert(
        converter._original_source_patterns, converter._original_target_patterns, converter.operations,
        force_cpu=converter.force_cpu,
    )  # fmt: skip
    copy.scope_prefix, copy.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return copy


def _experts(layer: PackedExperts, name: str, weights: Iterator[tuple[int, int, Tensor]]) -> dict[str, Tensor]:
    parent, _, parameter = name.rpartition(".")
    layer._is_hf_initialized = True
    return {f"{parent}.{key}": tensor for key, tensor in layer.packed(parameter, weights).items()}


def _matrices(fused: Tensor, matrices: int) -> Iterator[tuple[int, int, Tensor]]:
    """(expert, matrix, weight_RK) of a parameter that the file holds whole."""
    return ((e, m, part) for e, one in enumerate(fused) for m, part in enumerate(one.chunk(matrices)))
