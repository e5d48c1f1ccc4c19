"""Where rounding begins: scales and weights against the model itself and the paper's rule, and runs that go on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from brim.checkpoints.calibrate import block_bytes
from brim.errors import DoesNotFitError, RecipeError, Stopped
from brim.layers.fake_quantize import FakeQuantizedLinear
from brim.memory.measured import CpuMeter
from brim.models import describe
from brim.numerics.feedback import feedback_codes, output_error
from brim.recipe import Lora, Optimizer, Precision, Qat, Recipe, Training
from brim.training.build import Workload, build
from brim.training.job import Run
from brim.training.loop import run
from brim.training.rounding_start import begin_rounding, first_tokens

MakeRun = Callable[..., Run]
MakeRecipe = Callable[..., Recipe]
MakeWorkload = Callable[[Recipe], Workload]


def begun(job: Run, workload: Workload, **settings: Any) -> dict[str, FakeQuantizedLinear]:
    scratch = job.output.with_name("hidden")
    begin_rounding(workload, job.data, scratch=scratch, **settings)
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


@pytest.mark.parametrize(
    ("stop", "qat"),
    [
        (2, Qat(granularity="group:16", start="calibrated", train="adapters")),
        (2, Qat(granularity="group:16", start="mean", exact_share=0.5)),
        (3, Qat(granularity="group:16", start="calibrated", exact_share=0.5)),
    ],
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(stop: int, qat: Qat, make_run: MakeRun, tmp_path: Path) -> None:
    """Stopped at or after the step where rounding begins, and gone on with, the integers are the same, bit by
    bit; so they are where weights stay and only an update is learned."""
    settings: dict[str, Any] = {"method": "qat", "qat": qat, "lora": Lora(rank=2), "training": Training(max_steps=4)}
    whole, broken = (make_run("llama", output=tmp_path / name, **settings) for name in ("whole", "broken"))
    run(whole)
    steps: list[Any] = []
    with pytest.raises(Stopped):
        run(broken, on_step=steps.append, should_stop=lambda: len(steps) == stop)
    run(replace(broken, resume=True))
    ours, theirs = (load_file(job.output / "model.safetensors") for job in (whole, broken))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_nothing_is_rounded_before_rounding_begins(make_run: MakeRun, tmp_path: Path) -> None:
    """Of six steps the first three have the losses of training in full precision, bit by bit, and no later one has; the
    scales that follow are those of the weights then, not of the first ones."""
    optimizer = Optimizer(learning_rate=1e-2)
    qat = Qat(format="int3", granularity="group:16", exact_share=0.5, scale_rate=0.0)
    losses: dict[str, list[float]] = {"full": [], "qat": []}
    for method, found in losses.items():
        settings = {"method": method, "optimizer": optimizer, "qat": qat if method == "qat" else Qat()}
        job = make_run("llama", output=tmp_path / method, **settings)
        run(job, on_step=lambda record, found=found: found.append(record.loss))  # type: ignore[misc]
    same = [ours == theirs for ours, theirs in zip(losses["qat"], losses["full"], strict=True)]
    assert same == [True] * 3 + [False] * 3
    three = make_run("llama", output=tmp_path / "three", optimizer=optimizer)
    steps: list[Any] = []
    with pytest.raises(Stopped):
        run(three, on_step=steps.append, should_stop=lambda: len(steps) == 3)
    name = "model.layers.0.mlp.down_proj"
    files = (load_file(path) for path in (tmp_path / "three.partial").rglob("*.safetensors"))
    weight = next(tensor for file in files for key, tensor in file.items() if key.endswith(f"{name}.weight"))
    scale = load_file(tmp_path / "qat" / "model.safetensors")[f"{name}.weight_scale"]
    assert torch.allclose(scale, weight.unflatten(-1, (-1, 16)).abs().amax(-1) / 3)


def test_what_does_not_go_is_refused(make_run: MakeRun, make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """Families that do not run block by block, tasks of no decoder, and room for less than a block."""
    calibrated = Qat(granularity="group:16", start="calibrated")
    gemma = make_recipe("gemma3", method="qat", qat=calibrated)
    with pytest.raises(RecipeError, match="block by block"):
        build(gemma, describe(gemma.model))
    with pytest.raises(RecipeError, match="decoders alone"):
        make_recipe("t5", method="qat", qat=calibrated)
    with pytest.raises(RecipeError, match="trains weights"):
        make_recipe("llama", method="qat", qat=Qat(train="scales", exact_share=0.5))
    job = make_run("llama", method="qat", qat=calibrated)
    with pytest.raises(DoesNotFitError, match="of a block"):
        begun(job, make_workload(job.recipe), room_bytes=1000)


def test_it_takes_no_more_than_is_checked(make_run: MakeRun, make_workload: MakeWorkload) -> None:
    """What is allocated beside the model stays within the bytes that the room is checked for."""
    job = make_run("llama", method="qat", qat=Qat(granularity="group:16", start="calibrated"))
    workload = make_workload(job.recipe)
    tokens = first_tokens(job.data, job.recipe, longest=2**30)
    blocks: Any = workload.base.get_decoder().layers
    with CpuMeter() as meter:
        begun(job, workload)
        peak = meter.sample()[1]
    assert 0 < peak <= max(block_bytes(block, tokens=tokens.shape[1]) for block in blocks)
