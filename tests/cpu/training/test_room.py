"""A disk that fills up under a run: the run says so, waits, and ends as one that always had room."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from brim.cli import main
from brim.errors import Stopped
from brim.recipe import Training
from brim.training import checkpoint, room
from brim.training.job import Run
from brim.training.loop import run
from brim.training.metrics import Metrics, StepRecord
from brim.training.workplace import checkpoints_of, workplace_of

MakeRun = Callable[..., Run]
SAVING = Training(max_steps=6, save_every=2)
FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
"""In safetensors' own words."""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_POLL_S", 0.0)


def fills_up(monkeypatch: pytest.MonkeyPatch, *, at: int, tries: int) -> None:
    """The disk is full when file number `at` of a checkpoint is written, and for as many tries."""
    written, usage = 0, shutil.disk_usage("/")

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal written
        written += 1
        full = at <= written < at + tries
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 if full else 2**40))
        if full:
            path.write_bytes(b"half")
            raise FULL
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save)


def assert_same(one: Path, other: Path) -> None:
    weights, others = (load_file(path / "model.safetensors") for path in (one, other))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())


def test_a_checkpoint_waits_for_room(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Full three times, then not: the message has what is written, what it takes, what is free and what is kept, is
    told once, and the run ends with the bits of one that had room."""
    calm, job = make_run("gpt2", output=tmp_path / "calm", training=SAVING), make_run("gpt2", training=SAVING)
    run(calm)
    told: list[str] = []
    with monkeypatch.context() as patch:
        fills_up(patch, at=4, tries=3)  # a checkpoint has two files: the second one's last
        run(job, tell=told.append)
    assert len(told) == 2
    for words in ("is full: the checkpoint of step 4 takes", "3 B are free", "missing", "checkpoint of step 2 kept"):
        assert words in told[0]
    assert told[1] == "there is room again for the checkpoint of step 4: going on"
    assert_same(job.output, calm.output)


@pytest.mark.parametrize("at", [1, 4], ids=["first checkpoint", "second checkpoint"])
def test_a_stop_while_there_is_no_room(
    at: int, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stop that is asked for while the run waits ends it (75) with the last whole checkpoint and nothing half."""
    calm, job = make_run("gpt2", output=tmp_path / "calm", training=SAVING), make_run("gpt2", training=SAVING)
    run(calm)
    told: list[str] = []
    with monkeypatch.context() as patch:
        fills_up(patch, at=at, tries=10**6)
        with pytest.raises(Stopped, match="no room.*nothing kept" if at == 1 else "no room.*step 2 kept") as caught:
            run(job, tell=told.append, should_stop=lambda: bool(told))
    assert caught.value.exit_code == 75
    place = checkpoints_of(job.output)
    assert [path.name for path in place.iterdir()] == ([] if at == 1 else ["step-00000002"])
    run(replace(job, resume=True))
    assert_same(job.output, calm.output)


@pytest.mark.parametrize("stops", [False, True])
def test_the_model_waits_for_room(
    stops: bool, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A disk full at the very end loses nothing: what was learned is saved first, no half model is ever there; then the
    model is written when there is room, or by --resume without training again."""
    calm, job = make_run("gpt2", output=tmp_path / "calm"), make_run("gpt2")
    expected = run(calm)
    real, told, stepped, tries = PreTrainedModel.save_pretrained, list[str](), list[StepRecord](), 0

    def save_pretrained(self: Any, directory: Path, **named: Any) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            (directory / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(directory / "model.safetensors"))
        real(self, directory, **named)

    def tell(message: str) -> None:
        told.append(message)
        if len(told) == 1:
            assert "the model takes" in message and "checkpoint of step 6 kept" in message
            assert list(workplace_of(job.output).rglob("model*")) == []

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)
    if stops:
        with pytest.raises(Stopped, match="no room for the model, with the checkpoint of step 6"):
            run(job, tell=tell, should_stop=lambda: bool(told))
        assert not job.output.exists()
        tries = 3
        report = run(replace(job, resume=True), on_step=stepped.append)
        assert stepped == []
    else:
        report = run(job, tell=tell)
        assert told[1:] == ["there is room again for the model: going on"]
    assert_same(job.output, calm.output)
    assert report.measured.peak == expected.measured.peak
    assert (report.steps, report.last_loss) == (expected.steps, expected.last_loss)


def test_metrics_wait_for_room(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that the disk takes half of is written once more and whole; each step has one."""
    job, real, tries = make_run("llama"), Metrics._write, 0

    def write(self: Metrics, record: StepRecord) -> None:
        nonlocal tries
        tries += record.step == 3
        if record.step == 3 and tries < 3:
            assert self._file is not None
            self._file.write('{"step": 3, "lo')
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, record)

    monkeypatch.setattr(Metrics, "_write", write)
    told: list[str] = []
    run(job, tell=told.append)
    assert len(told) == 2 and "metrics.jsonl" in told[0]
    lines = (job.output / "metrics.jsonl").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == [f'{{"step": {step}' for step in range(1, 7)]


def test_another_error_of_the_disk_ends_the_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a full disk is waited for."""

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoint, "save_file", save)
    with pytest.raises(OSError, match="Read-only"):
        run(make_run("llama", training=SAVING))


def test_sigterm_while_there_is_no_room(
    tiny_directory: Callable[[str], Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command says where what is missing, and SIGTERM meanwhile ends it with 75."""
    data, output = tmp_path / "data.txt", tmp_path / "out"
    data.write_text("Filled to the brim and never over it.\n" * 20)
    fills_up(monkeypatch, at=3, tries=10**6)
    monkeypatch.setattr("time.sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    settings = ["precision.weights=fp32", "precision.compute=fp32", "training.save_every=2", "training.max_steps=6"]
    sets = [item for setting in settings for item in ("--set", setting)]
    command = ["tune", str(tiny_directory("gpt2")), "--data", str(data), "--seq-len", "16", "--output", str(output)]
    monkeypatch.setattr("brim.publish.check_room", lambda *_, **__: None)
    assert main([*command, *sets]) == 75
    err = capsys.readouterr().err
    assert f"the disk of {tmp_path} is full: the checkpoint of step 4" in err
    assert [path.name for path in checkpoints_of(output).iterdir()] == ["step-00000002"]
