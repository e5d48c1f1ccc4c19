"""qat.start = "calibrated": scales and weights to begin with, against the model itself and the paper's rule."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from brim.checkpoints.calibrate import block_bytes
from brim.checkpoints.decoder import BlockwiseDecoder
from brim.errors import DoesNotFitError, RecipeError, Stopped
from brim.layers.fake_quantize import FakeQuantizedLinear
from brim.memory.measured import CpuMeter
from brim.models import describe
from brim.models.directory import stored_tensors
from brim.numerics.feedback import feedback_codes, output_error
from brim.recipe import Lora, Precision, Qat, Recipe, Training
from brim.training.build import Workload, build
from brim.training.calibrated_start import calibrate_start, first_tokens
from brim.training.job import Run
from brim.training.loop import run

MakeRun = Callable[..., Run]
MakeRecipe = Callable[..., Recipe]
MakeWorkload = Callable[[Recipe], Workload]


def begun(job: Run, workload: Workload, **settings: Any) -> dict[str, FakeQuantizedLinear]:
    scratch = job.output.with_name("hidden")
    calibrate_start(workload, job.spec, job.weights, job.data, scratch=scratch, **settings)
    assert not scratch.exists()
    return {name: module for name, module in workload.base.named_modules() if isinstance(module, FakeQuantizedLinear)}


def moments_of(layers: dict[str, FakeQuantizedLinear], first: dict[str, Tensor], model: nn.Module, ids: Tensor) -> Any:
    """Name of a layer -> X^T X of its inputs while the whole model runs: its own block as it was at `first`, all others
    rounded as they are."""
    sums: dict[str, Tensor] = {}
    names = {layer: name for name, layer in layers.items()}

    def keep(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        sums[names[layer]] = arguments[0].flatten(0, -2).T @ arguments[0].flatten(0, -2)  # type: ignore[index]

    for block in {name.split(".layers.")[1].split(".")[0] for name in layers}:
        own = {name: layer for name, layer in layers.items() if f".layers.{block}." in name}
        begun_at = {name: layer.weight.detach().clone() for name, layer in own.items()}
        hooks = [layer.register_forward_pre_hook(keep) for layer in own.values()]
        for name, layer in own.items():
            layer.exact = True
            layer.weight.data.copy_(first[f"{name}.weight"])
        with torch.no_grad():
            model(input_ids=ids)
        for name, layer in own.items():
            layer.exact = False
            layer.weight.data.copy_(begun_at[name])
        for hook in hooks:
            hook.remove()
    return sums


@pytest.mark.parametrize(("format", "granularity"), [("int4", "group:16"), ("int3", "channel"), ("int4", "tensor")])
def test_codes_are_error_feedbacks(
    format: Any, granularity: str, make_run: MakeRun, make_workload: MakeWorkload
) -> None:
    """With the scales that were chosen, codes are GPTQ's of the first weights and of what flows into each layer of the
    whole model whose earlier blocks are rounded; outputs err less than from the least squared error of the weights."""
    qat = Qat(format=format, granularity=granularity, start="calibrated")
    job = make_run("llama", method="qat", qat=qat)
    workload = make_workload(job.recipe)
    first = {name: parameter.detach().clone() for name, parameter in workload.base.named_parameters()}
    layers = begun(job, workload)
    others = dict(make_workload(replace(job.recipe, qat=replace(qat, start="least-squares"))).base.named_modules())
    ids = first_tokens(job.data, job.recipe, longest=2**30)
    ours = theirs = 0.0
    for name, power in moments_of(layers, first, workload.base, ids).items():
        layer, other, weight = layers[name], others[name], first[f"{name}.weight"]
        assert isinstance(other, FakeQuantizedLinear)
        scale, codes = layer.scale.detach().expand(len(weight), -1), (layer.grid.low, layer.grid.high)
        assert float((layer.codes() == feedback_codes(weight, scale, power, codes=codes)).float().mean()) > 0.99, name
        ours += output_error(layer.decoded() - weight, power)
        theirs += output_error(other.decoded() - weight, power)
    assert ours < 0.9 * theirs


def test_steps_begin_from_what_was_chosen(make_run: MakeRun, make_workload: MakeWorkload) -> None:
    """FP32 copies that are stepped in BF16 weights' place are those weights."""
    precision = Precision(weights="bf16", master="fp32", compute="bf16")
    job = make_run("llama", method="qat", precision=precision, qat=Qat(granularity="group:16", start="calibrated"))
    workload = make_workload(job.recipe)
    begun(job, workload)
    copies = {name: tensor for name, tensor in workload.optimizer.state_dict().items() if name.endswith(".master")}
    trained = list(workload.trainable.values())
    assert len(copies) == len(trained)
    for index, parameter in enumerate(trained):
        assert torch.equal(copies[f"{index}.master"], parameter.detach().float())


def test_an_interrupted_run_ends_as_an_undisturbed_one(make_run: MakeRun, tmp_path: Path) -> None:
    """Gone on with, the integers are the same, bit by bit, and others than from absmax; with learned updates."""
    qat = Qat(granularity="group:16", start="calibrated", train="adapters")
    settings: dict[str, Any] = {"method": "qat", "lora": Lora(rank=2), "training": Training(max_steps=4)}
    whole, broken = (make_run("llama", output=tmp_path / name, qat=qat, **settings) for name in ("whole", "broken"))
    other = make_run("llama", output=tmp_path / "other", qat=replace(qat, start="absmax"), **settings)
    run(whole)
    run(other)
    steps: list[Any] = []
    with pytest.raises(Stopped):
        run(broken, on_step=steps.append, should_stop=lambda: len(steps) == 2)
    run(replace(broken, resume=True))
    ours, theirs, others = (load_file(job.output / "model.safetensors") for job in (whole, broken, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], others[name]) for name in ours)


def test_what_does_not_go_is_refused(make_run: MakeRun, make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """Families that do not run block by block, tasks of no decoder, and room for less than a block."""
    calibrated = Qat(granularity="group:16", start="calibrated")
    gemma = make_recipe("gemma3", method="qat", qat=calibrated)
    with pytest.raises(RecipeError, match="block by block"):
        build(gemma, describe(gemma.model))
    with pytest.raises(RecipeError, match="decoders alone"):
        make_recipe("t5", method="qat", qat=calibrated)
    job = make_run("llama", method="qat", qat=calibrated)
    with pytest.raises(DoesNotFitError, match="holds a block"):
        begun(job, make_workload(job.recipe), room_bytes=1000)


def test_it_takes_no_more_than_is_checked(make_run: MakeRun, make_workload: MakeWorkload) -> None:
    """What is allocated beside the model stays within the bytes that the room is checked for."""
    job = make_run("llama", method="qat", qat=Qat(granularity="group:16", start="calibrated"))
    workload = make_workload(job.recipe)
    decoder = BlockwiseDecoder(job.spec, {tensor.spec.name: tensor for tensor in stored_tensors(job.weights)})
    tokens = first_tokens(job.data, job.recipe, longest=decoder.max_tokens)
    with CpuMeter() as meter:
        begun(job, workload)
        peak = meter.sample()[1]
    assert 0 < peak <= max(block_bytes(block, tokens=tokens.shape[1]) for block in decoder.blocks)
