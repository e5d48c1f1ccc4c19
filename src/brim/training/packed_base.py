"""A frozen base whose linear layers and experts are packed as they are made or loaded, never whole in 16 bits.

transformers' loader reads tensor by tensor when it quantizes, and lets others bring their own quantizer: ours packs
each weight as it comes, whatever the family calls it in its files, and experts that are apart there one by one.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from brim.errors import RecipeError
from brim.layers.packed_experts import DOWN, GATE_UP, PackedExperts
from brim.layers.packed_linear import PackedLinear
from brim.layers.packing import Int4, Int8, Nf4, Packing
from brim.layers.swap import swap
from brim.models.skeleton import DTYPES
from brim.recipe import Precision, Recipe
from brim.training.experts import are_packable, fused_experts
from brim.training.linears import inner_linears

_METHOD = "brim-packed"
_STD = 0.02


class PackedBase:
    """Which modules are packed and how. Left alone, as bitsandbytes leaves them: the head, weights that are shared,
    and what the family keeps in FP32 (T5's `wo`); and, with a warning, experts that are laid out in a way of their own
    (gpt-oss).

    Shapes: R outputs, K inputs.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._packing = packing_of(recipe.precision)
        self._compute = DTYPES[recipe.precision.compute]
        self._task = recipe.task

    def swap(self, model: PreTrainedModel) -> None:
        """Raises RecipeError where there is nothing to pack."""
        kept, inner = set(model._keep_in_fp32_modules or ()), inner_linears(model, self._task)

        def match(name: str, module: nn.Module) -> bool:
            return (inner(name, module) or are_packable(module)) and not kept & set(name.split("."))

        if not swap(model, match=match, make=self._packed):
            raise RecipeError(
                f"{type(model).__name__} has no linear layer to pack: "
                'nearest: method = "lora", precision.weights = "bf16"'
            )
        for name, experts in fused_experts(model):
            warnings.warn(
                f"{name}: the experts of {type(experts).__name__} are laid out in a way that is not packed; they stay "
                "in 16 bits, and count as such",
                stacklevel=2,
            )
            break

    def _packed(self, module: nn.Module) -> nn.Module:
        return self._packed_experts(module) if are_packable(module) else self._packed_linear(module)

    def _packed_experts(self, module: Any) -> PackedExperts:
        experts, hidden, intermediate = module.down_proj.shape
        return PackedExperts(
            num_experts=experts, hidden=hidden, intermediate=intermediate, act_fn=module.act_fn,
            packing=self._packing, compute=self._compute, device=module.down_proj.device,
        )  # fmt: skip

    def _packed_linear(self, module: nn.Module) -> PackedLinear:
        assert isinstance(module, nn.Linear | Conv1D)
        transposed = isinstance(module, Conv1D)
        rows, inputs = reversed(module.weight.shape) if transposed else module.weight.shape
        return PackedLinear(
            inputs, rows, bias=module.bias, packing=self._packing, compute=self._compute, device=module.weight.device,
            transposed=transposed,
        )  # fmt: skip

    def fill(self, model: PreTrainedModel) -> None:
        for experts in (module for module in model.modules() if isinstance(module, PackedExperts)):
            experts.fill(std=_STD)
            experts._is_hf_initialized = True
        for layer in _packed_layers(model):
            layer.pack(torch.empty(layer.out_features, layer.in_features, dtype=layer.compute).normal_(std=_STD))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            _initialized(layer)

    def loading(self) -> QuantizationConfigMixin:
        config = _Config()
        config.base = self
        return config


def cast_norms(model: nn.Module) -> None:
    """Every norm in FP32."""
    for name, module in model.named_modules():
        if "norm" in name.rpartition(".")[2] or isinstance(module, nn.LayerNorm):
            module.to(torch.float32)


def packing_of(precision: Precision) -> Packing:
    """How this precision holds weights. Raises RecipeError for one that does not pack."""
    match precision.weights:
        case "nf4":
            return Nf4(nested=precision.double_quant)
        case "int8":
            return Int8()
        case "int4":
            return Int4(group_size=precision.group_size)
        case _:
            raise RecipeError(f'precision.weights = "{precision.weights}" is not packed; packed: nf4, int8, int4')


def _packed_layers(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def _initialized(layer: PackedLinear) -> None:
    """transformers' marks that keep its initializers, which want floats, away."""
    layer._is_hf_initialized = True
    layer.weight._is_hf_initialized = True  # type: ignore[attr-defined]


@register_quantization_config(_METHOD)
class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    """Carries the base through the loader."""

    base: PackedBase

    def __init__(self, **_: Any) -> None:
        self.quant_method: Any = _METHOD


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Packs each weight when the loader has read it."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        self.quantization_config.base.swap(model)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **settings: Any) -> bool:
        parent, _, name = param_name.rpartition(".")
        return name != "bias" and isinstance(model.get_submodule(parent), PackedLinear | PackedExperts)

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack()

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[WeightTransform]:
        merged: list[WeightTransform] = super().update_weight_conversions(weight_conversions, model)
        return [_by_expert(transform) if _merges_experts(transform) else transform for transform in merged]

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
            assert isinstance(layer, PackedLinear)
            weight_RK = weight.T.contiguous() if layer.transposed else weight
            held = layer.packing.pack(weight_RK.to(layer.compute))
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
