"""qlora on a base whose files are packed: what they hold is what is trained beside."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from brim.checkpoints.convert import quantize
from brim.errors import RecipeError
from brim.inference import load
from brim.layers.packed_linear import PackedLinear
from brim.models import describe
from brim.numerics.granularity import PerGroup
from brim.recipe import Lora, Precision, Recipe
from brim.training.batches import synthetic_batch
from brim.training.build import Workload, build
from brim.training.step import train_step

MakeRecipe = Callable[..., Recipe]
MakeWorkload = Callable[[Recipe], Workload]
LAYOUTS: dict[str, tuple[dict[str, Any], Precision]] = {
    "int8": ({"to": "int8"}, Precision(weights="int8", compute="fp32")),
    "int8, groups": ({"to": "int8", "granularity": PerGroup(32)}, Precision(weights="int8", compute="fp32")),
    "bitsandbytes int8": ({"to": "int8", "layout": "bitsandbytes"}, Precision(weights="int8", compute="fp32")),
    "torchao int8": ({"to": "int8", "layout": "torchao"}, Precision(weights="int8", compute="fp32")),
    "int4": ({"to": "int4"}, Precision(weights="int4", compute="fp32", group_size=32)),
    "nf4": ({"to": "nf4"}, Precision(weights="nf4", compute="fp32", double_quant=False)),
}

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module", params=list(LAYOUTS))
def stored(
    request: pytest.FixtureRequest, tiny_directory: Callable[[str], Path], make_recipe: MakeRecipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> Recipe:  # fmt: skip
    """A recipe whose model is packed in its files."""
    settings, precision = LAYOUTS[request.param]
    output = tmp_path_factory.mktemp("stored") / request.param.replace(" ", "-").replace(",", "")
    quantize(tiny_directory("llama-wide"), output, **settings)
    recipe = make_recipe("llama-wide", method="qlora", precision=precision, lora=Lora(rank=4))
    return replace(recipe, model=str(output))


def layers_of(workload: Workload) -> dict[str, PackedLinear]:
    return {name: module for name, module in workload.base.named_modules() if isinstance(module, PackedLinear)}


def test_adapters_learn_beside_what_the_files_hold(stored: Recipe, make_workload: MakeWorkload) -> None:
    """The base begins at the logits of the same files under `generate`, keeps each bit, and the loss falls."""
    workload = make_workload(stored)
    batch = synthetic_batch(stored, describe(stored.model))
    tokens, generating = torch.arange(24).view(2, 12), load(Path(stored.model)).model
    with torch.no_grad():
        ours, theirs = workload.model(input_ids=tokens).logits, generating(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    layers = layers_of(workload)
    before = {name: layer.unpacked() for name, layer in layers.items()}
    losses = [float(train_step(workload, [batch], learning_rate=1e-2)) for _ in range(5)]
    assert len(layers) == 14 and losses[-1] < losses[0]
    assert all(torch.equal(layer.unpacked(), before[name]) for name, layer in layers.items())


def test_codes_are_the_files_own(stored: Recipe, make_workload: MakeWorkload) -> None:
    """Each layer's codes are bytes of the file, and not rounded anew."""
    tensors = load_file(Path(stored.model) / "model.safetensors")
    codes = [tensor.view(torch.uint8).flatten() for tensor in tensors.values() if not tensor.is_floating_point()]
    layers = layers_of(make_workload(stored))
    for layer in layers.values():
        held = layer.held["weight"].view(torch.uint8).flatten()
        # pack-quantized INT8 is held without the 128 that its words add
        assert any(torch.equal(held, found) or torch.equal(held ^ 128, found) for found in codes)


def test_it_is_rehearsed_as_it_is_loaded(stored: Recipe, make_workload: MakeWorkload) -> None:
    """Name, shape and dtype of all that lives are those of random weights under the same files' headers."""

    def tensors_of(workload: Workload) -> dict[str, tuple[torch.Size, torch.dtype]]:
        held = [*workload.model.named_parameters(), *workload.model.named_buffers()]
        return {name: (tensor.shape, tensor.dtype) for name, tensor in held}

    assert tensors_of(make_workload(stored)) == tensors_of(build(stored, describe(stored.model)))


def test_nothing_of_the_file_stays_beside_what_is_held(stored: Recipe, make_workload: MakeWorkload) -> None:
    """No tensor is a view of what was read: its base would live as long as it does, and count twice."""
    model = make_workload(stored).model
    assert all(tensor._base is None for tensor in (*model.parameters(), *model.buffers()))


def test_another_format_than_the_recipe_says_is_refused(stored: Recipe, make_workload: MakeWorkload) -> None:
    """What is packed is not unpacked and packed anew in silence."""
    other = "int4" if stored.precision.weights == "int8" else "int8"
    with pytest.raises(RecipeError, match=f'the recipe says precision.weights = "{other}".*files of'):
        make_workload(replace(stored, precision=Precision(weights=other, compute="fp32")))  # type: ignore[arg-type]
