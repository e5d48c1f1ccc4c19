"""qlora: the base stays packed and as it is, the adapters learn, and PEFT and bitsandbytes agree."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from brim.errors import RecipeError
from brim.layers.packed_linear import PackedLinear
from brim.layers.packing import Nf4, held_bytes
from brim.memory.anatomy import Linear
from brim.memory.measured import CpuMeter
from brim.memory.packed import packed_bytes
from brim.models import describe
from brim.models.skeleton import DTYPES
from brim.recipe import Lora, Precision, Recipe
from brim.training.adapters import save_adapter
from brim.training.batches import synthetic_batch
from brim.training.build import Workload, build
from brim.training.packed_base import packing_of
from brim.training.step import train_step

MakeRecipe = Callable[..., Recipe]
MakeWorkload = Callable[[Recipe], Workload]
FORMATS = {
    "nf4": Precision(weights="nf4", compute="fp32"),
    "nf4, plain": Precision(weights="nf4", compute="fp32", double_quant=False),
    "int8": Precision(weights="int8", compute="fp32"),
    "int4": Precision(weights="int4", compute="fp32", group_size=16),
}

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def packed_layers(workload: Workload) -> dict[str, PackedLinear]:
    return {name: module for name, module in workload.base.named_modules() if isinstance(module, PackedLinear)}


def tensors_of(workload: Workload) -> dict[str, tuple[torch.Size, torch.dtype]]:
    held = [*workload.model.named_parameters(), *workload.model.named_buffers()]
    return {name: (tensor.shape, tensor.dtype) for name, tensor in held}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_adapters_learn_beside_a_base_that_stays(
    family: str, format: str, make_recipe: MakeRecipe, make_workload: MakeWorkload
) -> None:
    """The loss of a repeated batch falls, every adapter moves, and no bit of the base does."""
    recipe = make_recipe(family, method="qlora", precision=FORMATS[format], lora=Lora(rank=4))
    workload = make_workload(recipe)
    state = {**dict(workload.model.named_parameters()), **dict(workload.model.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    batch = synthetic_batch(recipe, describe(recipe.model))
    losses = [float(train_step(workload, [batch], learning_rate=1e-2)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert any("lora_" in name for name in state)
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name]) != ("lora_" in name), name


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "t5"])
def test_loaded_and_random_bases_hold_the_same_tensors(
    family: str, format: str, compute: Any, make_recipe: MakeRecipe, make_workload: MakeWorkload
) -> None:
    """Name, shape and dtype of all that lives: what is rehearsed on random weights is what is loaded."""
    precision = replace(FORMATS[format], compute=compute)
    recipe = make_recipe(family, method="qlora", precision=precision)
    assert tensors_of(make_workload(recipe)) == tensors_of(build(recipe, describe(recipe.model)))


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_lives_beside_a_loaded_base(format: str, make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """What the allocator holds after loading is the model's own tensors: no second copy of them, no plain weight."""
    recipe = make_recipe("llama-wide", method="qlora", precision=FORMATS[format])
    make_workload(recipe)  # what libraries make once and keep
    with CpuMeter() as meter:
        workload = make_workload(recipe)
        live, _ = meter.sample()
    tensors = [*workload.model.parameters(), *workload.model.buffers()]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(held.values()) <= live <= sum(held.values()) + 1024


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_layer_is_packed_from_its_weight_in_the_file(
    family: str, format: str, make_recipe: MakeRecipe, make_workload: MakeWorkload
) -> None:
    """All linear layers but the head are packed, each from its own weight; all else is the file's, bit by bit."""
    recipe = make_recipe(family, method="qlora", precision=FORMATS[format])
    workload = make_workload(recipe)
    source = AutoModelForCausalLM.from_pretrained(recipe.model)
    layers = packed_layers(workload)
    assert len(layers) == {"llama": 14, "gpt2": 8}[family]
    for name, layer in layers.items():
        weight = source.get_submodule(name.removesuffix(".base_layer")).weight.detach()
        weight_RK = (
            weight if isinstance(source.get_submodule(name.removesuffix(".base_layer")), nn.Linear) else weight.T
        )
        expected = packing_of(recipe.precision).pack(weight_RK.contiguous())
        assert all(torch.equal(layer.held[key], expected[key]) for key in expected)
    unpacked = {name.replace(".base_layer", ""): p for name, p in workload.base.named_parameters()}
    for name, parameter in source.named_parameters():
        if name in unpacked:
            assert torch.equal(unpacked[name], parameter), name


@pytest.mark.parametrize("nested", [True, False])
def test_the_base_computes_what_bitsandbytes_computes(
    nested: bool, make_recipe: MakeRecipe, make_workload: MakeWorkload, tmp_path: Path
) -> None:
    """transformers with bitsandbytes' NF4, and the adapter that was trained here, gives the trained model's logits."""
    precision = Precision(weights="nf4", compute="fp32", double_quant=nested)
    recipe = make_recipe("llama-wide", method="qlora", precision=precision, lora=Lora(rank=4))
    workload, spec = make_workload(recipe), describe(recipe.model)
    for step in range(3):
        train_step(workload, [synthetic_batch(recipe, spec, seed=step)], learning_rate=1e-2)
    assert isinstance(workload.model, PeftModel)
    save_adapter(workload.model, spec, tmp_path)
    settings: Any = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(recipe.model, quantization_config=settings)
    # Not evaluated: there bitsandbytes 0.50.2 repacks its weights for AVX-512 and rounds their scales to BF16.
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).train()
    workload.model.train()
    inputs = {"input_ids": torch.arange(1, 13)[None]}
    with torch.no_grad():
        assert torch.allclose(workload.model(**inputs).logits, loaded(**inputs).logits, atol=1e-4)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_estimates_bytes_are_those_held(name: str, compute: Any) -> None:
    """What the closed form counts for a layer, without torch, is what the layer's tensors have."""
    precision = Precision(
        weights=FORMATS[name].weights, compute=compute, double_quant=FORMATS[name].double_quant,
        group_size=FORMATS[name].group_size,
    )  # fmt: skip
    for rows, inputs in ((48, 32), (7, 48), (1536, 576)):
        held = held_bytes(packing_of(precision), rows, inputs, DTYPES[compute])
        assert packed_bytes(Linear(name="l", inputs=inputs, outputs=rows), precision) == held


def test_published_sizes_of_nf4() -> None:
    """QLoRA's figures: 0.5625 bytes an element, and about 0.127 bits more than 4 with double quantization."""
    numel = 4096 * 4096
    assert held_bytes(Nf4(nested=False), 4096, 4096, torch.bfloat16) / numel == pytest.approx(0.5625, rel=1e-4)
    bits = 8 * held_bytes(Nf4(nested=True), 4096, 4096, torch.bfloat16) / numel
    assert bits == pytest.approx(4 + 0.127, rel=1e-3)


def test_a_group_that_does_not_fit_the_model_is_refused(make_recipe: MakeRecipe) -> None:
    """The refusal names a size that the model takes."""
    recipe = make_recipe("llama", method="qlora", precision=Precision(weights="int4", compute="fp32"))
    with pytest.raises(RecipeError, match=r"nearest: precision\.group_size = 32"):
        build(recipe, describe(recipe.model))
