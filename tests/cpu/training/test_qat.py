"""qat: what is learned through rounding is saved as integers, and others read the very weights that were trained."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from brim.checkpoints.layouts import pack_quantized
from brim.errors import RecipeError, Stopped
from brim.layers.fake_quantize import FakeQuantizedLinear
from brim.models import describe
from brim.recipe import Lora, Optimizer, Precision, Qat, Recipe, Training
from brim.training.batches import synthetic_batch
from brim.training.build import Workload, build
from brim.training.fake_quantized import save_integers
from brim.training.job import Run
from brim.training.loop import run
from brim.training.step import train_step

MakeRecipe = Callable[..., Recipe]
MakeRun = Callable[..., Run]
MakeWorkload = Callable[[Recipe], Workload]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_packing_is_compressed_tensors(bits: int) -> None:
    """Codes of any width, in rows that do and do not fill words, come back from compressed-tensors' unpacking."""
    for inputs in (32, 24, 13):
        span = 2 ** (bits - 1)
        codes = torch.randint(-span, span, (5, inputs), dtype=torch.int8)
        packed = pack_quantized.pack(codes, bits=bits)
        assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("format", ["int8", "int4", "int3", "int2"])
def test_the_loss_falls_and_scales_are_learned(
    format: Any, make_recipe: MakeRecipe, make_workload: MakeWorkload
) -> None:
    """On a repeated batch the loss falls, and every scale has moved."""
    recipe = make_recipe("llama", method="qat", qat=Qat(format=format, granularity="group:16"))
    workload = make_workload(recipe)
    before = {name: tensor.detach().clone() for name, tensor in workload.trainable.items() if name.endswith("scale")}
    assert len(before) == 14
    batch = synthetic_batch(recipe, describe(recipe.model))
    losses = [float(train_step(workload, [batch], learning_rate=3e-3)) for _ in range(12)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(workload.trainable[name], tensor) for name, tensor in before.items())


def test_scales_alone(make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """With qat.train = scales the loss falls although no weight, norm or embedding moves."""
    recipe = make_recipe("llama", method="qat", qat=Qat(format="int3", granularity="group:16", train="scales"))
    workload = make_workload(recipe)
    assert all(name.endswith(".scale") for name in workload.trainable)
    frozen = {name: p.detach().clone() for name, p in workload.model.named_parameters() if not p.requires_grad}
    batch = synthetic_batch(recipe, describe(recipe.model))
    losses = [float(train_step(workload, [batch], learning_rate=3e-3)) for _ in range(12)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(workload.model.named_parameters())[name], tensor) for name, tensor in frozen.items())


def test_updates_within_rounding_alone(make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """With qat.train = adapters the loss falls, factors and scales move, and no weight, norm or embedding does."""
    qat = Qat(format="int4", granularity="group:16", train="adapters")
    recipe = make_recipe("llama", method="qat", qat=qat, lora=Lora(rank=4))
    workload = make_workload(recipe)
    assert {name.rpartition(".")[2] for name in workload.trainable} == {"scale", "up", "down"}
    before = {name: p.detach().clone() for name, p in workload.model.named_parameters()}
    batch = synthetic_batch(recipe, describe(recipe.model))
    losses = [float(train_step(workload, [batch], learning_rate=3e-3)) for _ in range(12)]
    assert losses[-1] < losses[0]
    for name, parameter in workload.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_scales_have_a_rate_of_their_own(make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """At qat.scale_rate = 0 no scale moves; at 10, AdamW's first step moves each ten times as far as at 1."""
    moved = {}
    for rate in (0.0, 1.0, 10.0):
        recipe = make_recipe("llama", method="qat", qat=Qat(granularity="channel", scale_rate=rate))
        workload = make_workload(recipe)
        name = next(name for name in workload.trainable if name.endswith(".scale"))
        before = workload.trainable[name].detach().clone()
        train_step(workload, [synthetic_batch(recipe, describe(recipe.model))], learning_rate=1e-4)
        moved[rate] = workload.trainable[name].detach() - before
    assert not moved[0.0].any() and moved[1.0].any()
    assert torch.allclose(moved[10.0], 10 * moved[1.0], rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("master", ["none", "fp32"])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "sgd", "lion"])
def test_weight_decay_leaves_scales_alone(
    name: Any, master: Any, make_recipe: MakeRecipe, make_workload: MakeWorkload
) -> None:
    """After a step with weight decay every scale is what it is without, and weights are not."""
    ends = []
    for decay in (0.0, 0.5):
        optimizer = Optimizer(name=name, weight_decay=decay, learning_rate=1e-2)
        precision = Precision(weights="bf16" if master == "fp32" else "fp32", master=master,
                              compute="bf16" if master == "fp32" else "fp32")  # fmt: skip
        qat = Qat(granularity="group:16")
        recipe = make_recipe("llama", method="qat", qat=qat, optimizer=optimizer, precision=precision)
        workload = make_workload(recipe)
        train_step(workload, [synthetic_batch(recipe, describe(recipe.model))], learning_rate=1e-2)
        ends.append(workload.trainable)
    plain, decayed = ends
    for key, tensor in plain.items():
        assert torch.equal(tensor, decayed[key]) == key.endswith(".scale"), key


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:16"])
@pytest.mark.parametrize(
    ("family", "format"), [("llama", "int8"), ("llama", "int4"), ("gemma3", "int4"), ("llama", "int3"), ("t5", "int4")]
)
def test_readers_see_the_trained_weights(
    family: str, format: Any, granularity: str, make_run: MakeRun, tmp_path: Path
) -> None:
    """transformers loads OUTPUT and gives the logits of the trained model; its files hold codes, not the weights."""
    settings = {"method": "qat", "qat": Qat(format=format, granularity=granularity)}
    job = make_run(family, training=Training(max_steps=3), **settings)
    run(job)
    stored = load_file(job.output / "model.safetensors")
    kind: Any = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    loaded = kind.from_pretrained(job.output).eval()
    trained = trained_again(job)
    inputs = {"input_ids": torch.arange(1, 13)[None]}
    if family == "t5":
        inputs["decoder_input_ids"] = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, trained(**inputs).logits, atol=1e-4)
    for name, module in trained.named_modules():
        if isinstance(module, FakeQuantizedLinear):
            assert f"{name}.weight" not in stored
            codes = unpack_from_int32(stored[f"{name}.weight_packed"], module.grid.bits, module.weight.shape)
            assert torch.equal(codes, module.codes())


def test_readers_see_updates_and_round_tokens(make_run: MakeRun, tmp_path: Path) -> None:
    """The integers have the update in them, and transformers rounds each token's inputs as training did."""
    qat = Qat(granularity="group:16", train="adapters", activations="int8")
    job = make_run("llama", training=Training(max_steps=3), method="qat", qat=qat, lora=Lora(rank=4))
    run(job)
    loaded, trained = AutoModelForCausalLM.from_pretrained(job.output).eval(), trained_again(job)
    inputs = {"input_ids": torch.arange(1, 13)[None]}
    with torch.no_grad():
        ours, theirs = trained(**inputs).logits, loaded(**inputs).logits
        for module in trained.modules():
            if isinstance(module, FakeQuantizedLinear):
                module.rounds_tokens = False
        plain = trained(**inputs).logits
    assert torch.allclose(ours, theirs, atol=1e-4) and not torch.allclose(ours, plain, atol=1e-4)
    assert not [name for name in load_file(job.output / "model.safetensors") if name.endswith((".up", ".down"))]


def trained_again(job: Run) -> nn.Module:
    """The model at the end of the same run, as it was trained."""
    kept: list[Workload] = []

    def remember(*arguments: Any, **settings: Any) -> Workload:
        kept.append(build(*arguments, **settings))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brim.training.loop.build", remember)
        run(replace(job, output=job.output.with_name("again")))
    return kept[0].model.eval()


def test_bf16_is_read_in_bf16(make_recipe: MakeRecipe, make_workload: MakeWorkload, tmp_path: Path) -> None:
    """BF16 weights are trained with BF16 scales, so what a BF16 reader decodes is what was trained."""
    recipe = make_recipe("llama", method="qat", precision=Precision(), qat=Qat(granularity="channel"))
    workload = make_workload(recipe)
    batch = synthetic_batch(recipe, describe(recipe.model))
    for _ in range(3):
        train_step(workload, [batch], learning_rate=1e-3)
    save_integers(workload.base, tmp_path, recipe)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    workload.model.eval()
    with torch.no_grad():
        ours, theirs = (model(input_ids=torch.arange(1, 13)[None]).logits for model in (workload.model, loaded))
    assert loaded.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["ignore"] == ["lm_head"]


def test_an_interrupted_run_ends_as_an_undisturbed_one(make_run: MakeRun, tmp_path: Path) -> None:
    """Stopped after two of four steps and gone on with, the integers are the same, bit by bit."""
    settings = {"method": "qat", "qat": Qat(granularity="group:16"), "training": Training(max_steps=4)}
    whole, broken = (make_run("llama", output=tmp_path / name, **settings) for name in ("whole", "broken"))
    run(whole)
    steps: list[Any] = []
    with pytest.raises(Stopped):
        run(broken, on_step=steps.append, should_stop=lambda: len(steps) == 2)
    run(replace(broken, resume=True))
    ours, theirs = (load_file(job.output / "model.safetensors") for job in (whole, broken))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_transposed_layers_are_refused(make_recipe: MakeRecipe) -> None:
    """GPT-2 has no layout of integers that others read, and the refusal says so before a step is done."""
    recipe = make_recipe("gpt2", method="qat")
    with pytest.raises(RecipeError, match="transposed"):
        build(recipe, describe(recipe.model))
