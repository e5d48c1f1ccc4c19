"""A frozen base whose linear layers and experts are packed as they are made or loaded, never whole in 16 bits."""

import warnings
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from brim.errors import RecipeError
from brim.layers.experts import are_packable, fused_experts
from brim.layers.packed_linear import PackedLinear
from brim.layers.packed_loading import loading
from brim.layers.packed_model import fill, packed_module
from brim.layers.packing import Int4, Int8, Nf4, Packing
from brim.layers.swap import swap
from brim.models.read_weights import read_linears
from brim.models.skeleton import DTYPES
from brim.recipe import Precision, Recipe
from brim.training.linears import inner_linears


class PackedBase:
    """Which modules are packed and how. Left alone, as bitsandbytes leaves them: the head, weights that are shared, and
    what the family keeps in FP32 (T5's `wo`). Besides, weights that it reads without calling their layer (Mamba's
    `dt_proj`); and, with a warning, experts that are laid out in a way of their own (gpt-oss).
    """

    renamed: Mapping[str, str] = {}

    def __init__(self, recipe: Recipe) -> None:
        self._packing = packing_of(recipe.precision)
        self._compute = DTYPES[recipe.precision.compute]
        self._task = recipe.task
        self._library = recipe.library

    def swap(self, model: PreTrainedModel) -> None:
        """Raises RecipeError where there is nothing to pack."""
        kept, inner = set(model._keep_in_fp32_modules or ()), inner_linears(model, self._task)
        read = set(read_linears(model))
        if self._library.model == "litgpt":
            inner = _any_linear  # Fabric's plugin puts its class in the place of nn.Linear's, the head's too

        def match(name: str, module: nn.Module) -> bool:
            packs = inner(name, module) or are_packable(module)
            return packs and name not in read and not kept & set(name.split("."))

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
        packed = packed_module(module, packing=self._packing, compute=self._compute)
        if isinstance(packed, PackedLinear):
            packed.holds_input = self._library.packed == "bitsandbytes-0.42"
        return packed

    def fill(self, model: PreTrainedModel) -> None:
        fill(model)

    def finish(self, model: PreTrainedModel) -> None:
        """Weights stay in the order of the files: backward unpacks them."""

    def loading(self) -> QuantizationConfigMixin:
        return loading(self)


def _any_linear(_: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


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
