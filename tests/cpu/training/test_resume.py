"""A run that was interrupted goes on to the same bits; a checkpoint is whole, the run's own, or refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from brim.errors import ModelFileError, Stopped, UsageError
from brim.recipe import Memory, Optimizer, Precision, Training
from brim.training import workplace
from brim.training.job import Run
from brim.training.loop import run
from brim.training.metrics import StepRecord
from brim.training.workplace import can_resume, checkpoints_of, workplace_of

MakeRun = Callable[..., Run]
SAVING = Training(max_steps=6, save_every=2)


class Killed(BaseException):
    """Ends the run as a kill would: nobody handles it."""


def killed_after(step: int) -> Callable[[StepRecord], None]:
    def on_step(record: StepRecord) -> None:
        if record.step == step:
            raise Killed

    return on_step


def stop_after(step: int) -> Callable[[], bool]:
    """For `should_stop`, which is asked before the first step and after each."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == step + 1

    return should_stop


def outcome(output: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The trained tensors, and the metrics but for the clock's."""
    (weights,) = output.glob("*.safetensors")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return load_file(weights), [{**line, "tokens_per_s": 0} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    (weights, lines), (other_weights, other_lines) = outcome(one), outcome(other)
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert lines == other_lines


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {}),
        ("gpt2", {"method": "lora", "grad_accumulation": 2}),
        ("llama", {"precision": Precision(weights="bf16", compute="bf16", master="fp32")}),
        ("t5", {"memory": Memory(loss="chunked", activation_checkpointing="full")}),
        ("llama", {"optimizer": Optimizer(name="sgd")}),
        ("llama", {"optimizer": Optimizer(name="lion")}),
        ("llama", {"optimizer": Optimizer(name="adafactor")}),
        ("gpt2", {"optimizer": Optimizer(in_backward=True, max_grad_norm=0.0)}),
        ("llama", {"precision": Precision(weights="fp32", compute="fp16")}),
        ("gpt2", {"optimizer": Optimizer(name="adamw8bit")}),
        ("llama", {"precision": Precision(), "optimizer": Optimizer(rounding="stochastic")}),
        ("llama", {"memory": Memory(offload="optimizer")}),
        ("gpt2", {"memory": Memory(offload="all")}),
    ],
    ids=[
        "dropout",
        "lora",
        "masters",
        "t5",
        "sgd",
        "lion",
        "adafactor",
        "in backward",
        "fp16",
        "8 bits",
        "by chance",
        "offloaded",
        "all offloaded",
    ],
)
def test_resume_gives_the_same_bits(family: str, settings: dict[str, Any], make_run: MakeRun, tmp_path: Path) -> None:
    """Stopped twice and resumed, a run ends with the weights, metrics and peak of one that was left in peace."""
    undisturbed = make_run(family, output=tmp_path / "undisturbed", held=True, **settings)
    expected = run(undisturbed)
    job = make_run(family, held=True, **settings)
    for resume, steps, said in ((False, 2, "step 2 of 6"), (True, 1, "step 3 of 6")):
        with pytest.raises(Stopped, match=f"stopped after {said}.*--resume") as caught:
            run(replace(job, resume=resume), should_stop=stop_after(steps))
        assert caught.value.exit_code == 75
        assert not job.output.exists()
    records: list[StepRecord] = []
    report = run(replace(job, resume=True), on_step=records.append)
    assert [record.step for record in records] == [4, 5, 6]
    assert_same(job.output, undisturbed.output)
    assert report.measured.peak == expected.measured.peak
    assert (report.first_loss, report.last_loss) == (expected.first_loss, expected.last_loss)
    assert report.evaluation == expected.evaluation


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_killed_run_resumes(step: int, make_run: MakeRun, tmp_path: Path) -> None:
    """Killed at any step, in the middle of a line too, --resume goes on from the last checkpoint, or starts anew."""
    undisturbed = make_run("gpt2", output=tmp_path / "undisturbed", training=SAVING)
    run(undisturbed)
    job = make_run("gpt2", training=SAVING)
    with pytest.raises(Killed):
        run(job, on_step=killed_after(step))
    with (workplace_of(job.output) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert can_resume(job.output) == (step > 2)
    records: list[StepRecord] = []
    run(replace(job, resume=True), on_step=records.append)
    assert records[0].step == {1: 1, 3: 3, 4: 3, 6: 5}[step]
    assert_same(job.output, undisturbed.output)


def test_killed_while_publishing(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Killed between the model's writing and its final name, a run has its checkpoint and ends as undisturbed."""
    undisturbed, job = make_run("gpt2", output=tmp_path / "one", training=SAVING), make_run("gpt2", training=SAVING)
    run(undisturbed)

    def killed(_: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(workplace, "sync_tree", killed)
        with pytest.raises(Killed):
            run(job)
    assert not job.output.exists()
    run(replace(job, resume=True))
    assert_same(job.output, undisturbed.output)
    assert sorted(path.name for path in job.output.iterdir()) == sorted(p.name for p in undisturbed.output.iterdir())


def test_checkpoints_come_and_go(make_run: MakeRun) -> None:
    """`save_every` writes checkpoints at its steps; older ones and remains of half ones go, none stays at the end."""
    job, found = make_run("llama", training=SAVING), list[list[str]]()

    def on_step(record: StepRecord) -> None:
        found.append(sorted(path.name for path in checkpoints_of(job.output).glob("*")))
        if record.step == 3:
            (checkpoints_of(job.output) / ".step-00000003.partial").mkdir()

    run(job, on_step=on_step)
    second, fourth = "step-00000002", "step-00000004"
    assert found == [[], [], [second], [".step-00000003.partial", second], [fourth], [fourth]]
    assert not (job.output / "checkpoints").exists()


def test_stop_before_the_first_step(make_run: MakeRun) -> None:
    """A stop before any step leaves nothing behind."""
    job = make_run("llama")
    with pytest.raises(Stopped, match="before the first step"):
        run(job, should_stop=lambda: True)
    assert not workplace_of(job.output).exists()


def test_a_stop_at_the_last_step_is_too_late(make_run: MakeRun) -> None:
    """Asked to stop after the last step, the run just ends."""
    run(make_run("llama"), should_stop=stop_after(6))


def interrupted(make_run: MakeRun) -> Run:
    job = make_run("llama")
    with pytest.raises(Stopped):
        run(job, should_stop=stop_after(3))
    return job


def test_an_interrupted_run_is_not_overwritten(make_run: MakeRun) -> None:
    """Without --resume a run in the place of an interrupted one is refused, and that one stays whole."""
    job = interrupted(make_run)
    with pytest.raises(UsageError, match="holds an interrupted run; go on with --resume"):
        run(job)
    run(replace(job, resume=True))


@pytest.mark.parametrize("changed", ["recipe", "data"])
def test_resume_is_for_the_same_run(changed: str, make_run: MakeRun) -> None:
    """A checkpoint of another recipe or other data is refused, and nothing of it is touched."""
    job = interrupted(make_run)
    other = (
        replace(job, recipe=replace(job.recipe, optimizer=Optimizer(learning_rate=0.5)))
        if changed == "recipe"
        else replace(job, data=replace(job.data, labels=job.data.labels.flip(0)))
    )
    with pytest.raises(UsageError, match=f"belongs to another {changed}"):
        run(replace(other, resume=True))
    run(replace(job, resume=True))
    assert (job.output / "recipe.toml").read_text() == job.recipe.to_toml()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def reshape(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.zeros(3)}, path)


def drop(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith(sorted(tensors)[0])}, path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("trainable.safetensors", cut),
        ("trainable.safetensors", reshape),
        ("trainable.safetensors", drop),
        ("trainable.safetensors", Path.unlink),
        ("optimizer.safetensors", cut),
        ("optimizer.safetensors", reshape),
        ("optimizer.safetensors", drop),
        ("state.json", cut),
        ("state.json", Path.unlink),
        ("state.json", lambda path: path.write_text("[]")),
        ("state.json", lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "progress": {}}))),
    ],
)
def test_damaged_checkpoint(name: str, damage: Callable[[Path], object], make_run: MakeRun) -> None:
    """A checkpoint that lost or changed a part is a ModelFileError (exit 4) that names it and what to do."""
    job = interrupted(make_run)
    damage(checkpoints_of(job.output) / "step-00000003" / name)
    with pytest.raises(ModelFileError, match=r"step-00000003 is damaged.*remove it to start over") as caught:
        run(replace(job, resume=True))
    assert caught.value.exit_code == 4
    shutil.rmtree(checkpoints_of(job.output) / "step-00000003")
    run(replace(job, resume=True))


def test_events_hold_each_step_once(make_run: MakeRun) -> None:
    """TensorBoard shows each step once, also those that were done twice."""
    job = make_run("gpt2", training=SAVING)
    with pytest.raises(Killed):
        run(job, on_step=killed_after(4))
    # TensorBoard reads files in the order of their names: a second, then a counter that ten follow nine in only as a
    # number. Two runs of one second are the test's alone.
    (first,) = (workplace_of(job.output) / "events").iterdir()
    first.rename(first.with_name("events.out.tfevents.1.earlier"))
    run(replace(job, resume=True))
    events = EventAccumulator(str(job.output / "events")).Reload().Scalars("loss")
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events] == pytest.approx([line["loss"] for line in lines])
