"""`method = "qat"`: the model's inner linear layers trained through rounding, and saved as true integers.

Saved in compressed-tensors' pack-quantized layout: what a reader decodes is, bit by bit, the weight that was trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from brim.checkpoints.layouts import pack_quantized
from brim.errors import RecipeError
from brim.layers.fake_quantize import FakeQuantizedLinear, Grid, Update
from brim.layers.swap import swap
from brim.numerics.granularity import parse_granularity
from brim.recipe import Recipe
from brim.training.linears import inner_linears


def quantize_fake(model: PreTrainedModel, recipe: Recipe) -> None:
    """Put fake-quantized layers in place; their weights are the model's own tensors.

    Raises RecipeError where groups do not fill a layer's rows, or there is nothing to quantize.
    """
    grid = Grid(bits=recipe.qat.bits, granularity=parse_granularity(recipe.qat.granularity))
    update = Update(rank=recipe.lora.rank, factor=recipe.lora.factor) if recipe.updates_rounded else None
    rounds_tokens = recipe.qat.activations == "int8"

    def make(module: nn.Module) -> nn.Module:
        if not isinstance(module, nn.Linear):
            raise RecipeError(
                f"{type(model).__name__} holds its linear layers transposed, which no layout of integers does; "
                'nearest: method = "full"'
            )
        # what calibration chooses it does when the data is there
        start = "absmax" if recipe.qat.start == "calibrated" else recipe.qat.start
        return FakeQuantizedLinear(module, grid=grid, start=start, update=update, rounds_tokens=rounds_tokens)

    if not swap(model, match=inner_linears(model, recipe.task), make=make):
        raise RecipeError(f'{type(model).__name__} has no linear layer to quantize; nearest: method = "full"')
    if recipe.qat.train != "all":
        model.requires_grad_(False)
        for layer in layers_of(model):
            for learned in (layer.scale, layer.up, layer.down):
                if learned is not None:
                    learned.requires_grad_(True)


def scales_of(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales: weight decay, which pulls to zero, is not for them."""
    return [layer.scale for layer in layers_of(model)]


def set_exact(model: nn.Module, exact: bool) -> None:
    """Whether weights and inputs are used as they are."""
    for layer in layers_of(model):
        layer.exact = exact


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """The model with its weights and inputs as they are."""
    set_exact(model, True)
    try:
        yield
    finally:
        set_exact(model, False)


def layers_of(model: nn.Module) -> list[FakeQuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, FakeQuantizedLinear)]


def save_integers(model: PreTrainedModel, directory: Path, recipe: Recipe) -> None:
    """The model in Hugging Face form, its fake-quantized weights as integers, all else as it is."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizedLinear)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        parent, _, key = name.rpartition(".")
        if parent not in layers or key == "bias":
            tensors[name] = tensor
        elif key == "weight":
            tensors |= {f"{parent}.{suffix}": part for suffix, part in _packed(layers[parent]).items()}
    left_alone = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    settings = pack_quantized.config(
        bits=recipe.qat.bits,
        granularity=recipe.qat.granularity,
        ignore=left_alone,
        rounds_tokens=recipe.qat.activations == "int8",
    )
    model.config.quantization_config = settings
    try:
        model.save_pretrained(directory, state_dict=tensors)
    finally:
        del model.config.quantization_config


def _packed(layer: FakeQuantizedLinear) -> dict[str, Tensor]:
    scale = layer.stored_scale(layer.weight.dtype)
    return pack_quantized.tensors(layer.codes(), scale.view(-1) if scale.numel() == 1 else scale, bits=layer.grid.bits)
