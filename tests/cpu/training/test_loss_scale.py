"""Loss scaling against torch's own scaler, and a step that overflows."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from brim.errors import UsageError
from brim.models import describe
from brim.recipe import Optimizer, Precision, Recipe
from brim.training import loss_scale
from brim.training.batches import Batch, synthetic_batch
from brim.training.build import Workload
from brim.training.job import Run
from brim.training.loop import run
from brim.training.loss_scale import LossScale
from brim.training.step import train_step

MakeRecipe = Callable[..., Recipe]
MakeWorkload = Callable[[Recipe], Workload]
MakeRun = Callable[..., Run]
MIXED = Precision(weights="fp32", compute="fp16")
PURE = Precision(weights="fp16", compute="fp16", master="fp32")


def batch_of(recipe: Recipe) -> Batch:
    return synthetic_batch(recipe, describe(recipe.model))


def stepped(workload: Workload) -> tuple[float, list[Tensor]]:
    """Loss of one step, and how far it moved each trained weight, or its FP32 copy."""
    has_masters = workload.recipe.precision.master == "fp32"
    # masters come first among what the optimizer keeps
    moved = list(workload.optimizer.tensors() if has_masters else workload.trainable.values())
    before = [weight.detach().clone() for weight in moved]
    loss = float(train_step(workload, [batch_of(workload.recipe)], learning_rate=0.1))
    return loss, [weight.detach() - start for weight, start in zip(moved, before, strict=True)]


def weights(workload: Workload) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in workload.trainable.items()}


def test_the_scale_moves_as_torchs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over good and overflowing steps the scale is that of GradScaler with the same constants."""
    monkeypatch.setattr(loss_scale, "_GROWTH_STEPS", 3)
    theirs = torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, ours = torch.optim.SGD([weight], lr=0.1), LossScale()
    for finite in (True, False, True, True, True, True, False, False, True):
        theirs.scale(weight.sum() * (1.0 if finite else float("inf"))).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(finite=finite)
        assert (ours.value, ours.skipped) == (theirs.get_scale(), not finite)
    restored = LossScale()
    restored.load_state(ours.state())
    assert torch.equal(restored.state(), ours.state())


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
@pytest.mark.parametrize("precision", [MIXED, PURE], ids=["autocast", "masters"])
def test_a_scaled_step_is_the_plain_step(
    precision: Precision, max_grad_norm: float, make_recipe: MakeRecipe, make_workload: MakeWorkload
) -> None:
    """FP16 with the loss scaled and gradients unscaled steps as FP32 does, within FP16's precision; clipped or not."""
    optimizer = Optimizer(name="sgd", learning_rate=0.1, max_grad_norm=max_grad_norm)
    exact = make_workload(make_recipe("llama", optimizer=optimizer))
    recipe = make_recipe("llama", optimizer=optimizer, precision=precision)
    scaled = make_workload(recipe)
    (loss, step), (scaled_loss, scaled_step) = (stepped(workload) for workload in (exact, scaled))
    assert scaled_loss == pytest.approx(loss, rel=1e-2)
    assert scaled.loss_scale is not None and not scaled.loss_scale.skipped
    for mine, theirs in zip(scaled_step, step, strict=True):
        assert torch.linalg.norm(mine - theirs) < 0.05 * torch.linalg.norm(theirs)


def test_a_scale_that_never_fits_ends_the_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """When gradients overflow down to a scale of 1, the run stops and names formats with a wider range."""
    monkeypatch.setattr(loss_scale, "_START", 2.0**40)
    monkeypatch.setattr(loss_scale, "_LEAST", 2.0**38)
    with pytest.raises(UsageError, match=r'gradients of step 3 overflow.*precision.weights = "bf16"'):
        run(make_run("llama", precision=PURE))


def test_metrics_tell_each_skipped_step(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are skipped until the scale, halved by each, fits; each line says so and names the scale that is next."""
    monkeypatch.setattr(loss_scale, "_START", 2.0**20)
    job = make_run("llama", precision=PURE)
    run(job)
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["skipped"] for line in lines]
    assert skipped[0] == 1 and skipped[-1] == 0
    halvings = [sum(skipped[: index + 1]) for index in range(len(lines))]
    assert [line["loss_scale"] for line in lines] == [2.0 ** (20 - count) for count in halvings]


def test_a_skipped_step_changes_nothing(make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """After an overflow weights are the same bits, there are no gradients and no optimizer state."""
    workload = make_workload(make_recipe("llama", precision=PURE))
    assert workload.loss_scale is not None
    workload.loss_scale.value = 2.0**40
    before = weights(workload)
    train_step(workload, [batch_of(workload.recipe)], learning_rate=0.1)
    assert workload.loss_scale.skipped and workload.loss_scale.value == 2.0**39
    assert all(torch.equal(weight, before[name]) for name, weight in weights(workload).items())
    assert all(parameter.grad is None for parameter in workload.trainable.values())
    assert not any("exp_avg" in name for name in workload.optimizer.state_dict())
