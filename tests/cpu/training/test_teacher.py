"""Learning from the model as it was: soft targets against PyTorch's own, and what the teacher is found to say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from brim.errors import RecipeError, Stopped
from brim.layers import chunked_loss
from brim.layers.chunked_loss import IGNORED, chunked_cross_entropy
from brim.layers.soft_labels import SoftLabels, cross_entropy, soft_labels
from brim.memory.measured import CpuMeter
from brim.recipe import Memory, Precision, Qat, Recipe, Training
from brim.training.build import Workload
from brim.training.job import Run
from brim.training.loop import run
from brim.training.teacher import taught

MakeRun = Callable[..., Run]
MakeWorkload = Callable[[Recipe], Workload]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_loss_is_that_of_the_mixed_target(chunked: bool, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and both gradients are those of PyTorch's cross-entropy with probabilities as its target."""
    monkeypatch.setattr(chunked_loss, "_CHUNK_BYTES", 1)
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(8, 31, bias=False), torch.randn(40, 8), torch.randint(0, 31, (40,))
    labels[::5] = IGNORED
    ids = torch.rand(40, 31).topk(4).indices.to(torch.int32)
    # in BF16 these sum to one
    said = SoftLabels(ids, torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.bfloat16).expand(40, 4))
    target = torch.zeros(40, 31).scatter(1, said.ids_NK.long(), share * said.probabilities_NK.float())
    target[torch.arange(40), labels.clamp(min=0)] += 1 - share
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    nats = F.cross_entropy(head(theirs), target, reduction="none")[labels != IGNORED].sum()
    nats.backward()
    assert head.weight.grad is not None
    expected, head.weight.grad = head.weight.grad, None
    if chunked:
        loss = chunked_cross_entropy(ours, head, labels, scale=1.0, finish=lambda raw: raw, soft=said, share=share)
    else:
        loss = cross_entropy(head(ours), labels, said, share)
    loss.backward()
    assert torch.allclose(loss, nats, rtol=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(head.weight.grad, expected, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("train", ["all", "adapters"])
def test_the_teacher_is_the_model_in_full_precision(
    train: Any, make_run: MakeRun, make_workload: MakeWorkload, tmp_path: Path
) -> None:
    """Of each row that the run reads, ids and probabilities are those of transformers' model; asked again, the files
    answer; and no more memory is taken than a step takes."""
    qat = Qat(granularity="group:16", teacher_top=5, train=train, activations="int8")
    job = make_run("llama", method="qat", qat=qat, training=Training(max_steps=2), precision=Precision(weights="fp32"))
    workload = make_workload(job.recipe)
    data = taught(workload, job.data, tmp_path)
    assert data.soft is not None
    plain: Any = AutoModelForCausalLM.from_pretrained(job.weights).eval()
    read = sorted({row for step in range(2) for row in job.data.step_rows(job.recipe, step)})
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = soft_labels(plain(input_ids=job.data.input_ids[read]).logits, 5)
    said = data.soft.mapped(lambda tensor: tensor[read])
    assert torch.allclose(said.probabilities_NK.float(), expected.probabilities_NK.float(), atol=0.02)
    assert (said.ids_NK == expected.ids_NK).float().mean() > 0.9
    assert not list(tmp_path.glob("*.part"))
    for layer in workload.model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.zero_()
    again = taught(workload, job.data, tmp_path).soft
    assert again is not None and torch.equal(again.ids_NK, data.soft.ids_NK)


def test_asking_takes_less_than_a_step(make_run: MakeRun, make_workload: MakeWorkload, tmp_path: Path) -> None:
    """The teacher's peak is below that of the step, which is the one that is predicted."""
    settings: dict[str, Any] = {"method": "qat", "memory": Memory(loss="chunked"), "training": Training(max_steps=1)}
    job = make_run("llama", qat=Qat(granularity="group:16", teacher_top=5), **settings)
    workload = make_workload(job.recipe)
    with CpuMeter() as meter:
        data = taught(workload, job.data, tmp_path)
        asked = meter.sample()[1]
        from_here = data.step_batches(job.recipe, 0)
        workload.optimizer.set_learning_rate(1e-3)
        loss = workload.loss({"input_ids": from_here[0].input_ids}, from_here[0].labels, soft=from_here[0].soft)
        loss.backward()
        assert 0 < asked < meter.sample()[1]


def test_an_interrupted_run_with_a_teacher_ends_as_an_undisturbed_one(make_run: MakeRun, tmp_path: Path) -> None:
    """Gone on with, the integers are the same, bit by bit, others than without a teacher; and its files are gone."""
    settings = {"method": "qat", "training": Training(max_steps=4)}
    qat = Qat(granularity="group:16", teacher_top=4, scale_rate=10.0)
    whole, broken = (make_run("llama", output=tmp_path / name, qat=qat, **settings) for name in ("whole", "broken"))
    alone = make_run("llama", output=tmp_path / "alone", qat=replace(qat, teacher_top=0), **settings)
    run(whole)
    run(alone)
    steps: list[Any] = []
    with pytest.raises(Stopped):
        run(broken, on_step=steps.append, should_stop=lambda: len(steps) == 2)
    run(replace(broken, resume=True))
    ours, theirs, others = (load_file(job.output / "model.safetensors") for job in (whole, broken, alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], others[name]) for name in ours)
    assert not list(whole.output.rglob("teacher*"))


def test_more_than_there_are_tokens_is_refused(make_run: MakeRun) -> None:
    """The refusal names the most that there are."""
    job = make_run("llama", method="qat", qat=Qat(granularity="group:16", teacher_top=10**6))
    with pytest.raises(RecipeError, match=r"nearest: qat\.teacher_top = \d+"):
        run(job)
