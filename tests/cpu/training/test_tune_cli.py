"""`brim tune` as a user types it: what goes where, and what a signal does at each moment."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from brim.cli import main, tune
from brim.training import loop, start
from brim.training.metrics import StepRecord
from brim.training.workplace import checkpoints_of, workplace_of

Captured = pytest.CaptureFixture[str]
TEXT = "Filled to the brim and never over it.\n" * 20
SMALL = ["--seq-len", "16", "--set", "precision.weights=fp32", "--set", "precision.compute=fp32"]


@pytest.fixture
def arguments(tiny_directory: Callable[[str], Path], tmp_path: Path) -> list[str]:
    """`tune` on a model with dropout, six steps, a checkpoint after each second."""
    data = tmp_path / "data.txt"
    data.write_text(TEXT)
    steps = ["--max-steps", "6", "--set", "training.save_every=2"]
    return ["tune", str(tiny_directory("gpt2")), "--data", str(data), *SMALL, *steps, "--output"]


def signal_at(step: int, *numbers: int) -> Callable[[StepRecord], str]:
    """For `tune.step_line`: the process gets these signals when it tells of a step."""
    plain = tune.step_line

    def step_line(record: StepRecord) -> str:
        if record.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return plain(record)

    return step_line


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_json(arguments: list[str], tmp_path: Path, capsys: Captured) -> None:
    """`--json` prints the report that lies in OUTPUT and nothing else; steps go to stderr."""
    output = tmp_path / "out"
    assert main([*arguments, str(output), "--eval-data", str(tmp_path / "data.txt"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((output / "report.json").read_text())
    assert json.loads(captured.out)["evaluation"]["perplexity"] > 1
    assert re.search(r"^step 6/6  loss [\d.]+  on evaluation data [\d.]+  .* tokens/s  memory .*peak .* left$",
                     captured.err, flags=re.MULTILINE)  # fmt: skip


def test_table(arguments: list[str], tmp_path: Path, capsys: Captured) -> None:
    """Without `--json` predicted stands beside measured, each line's difference too, and the place is named."""
    output = tmp_path / "out"
    assert main([*arguments, str(output)]) == 0
    out = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    for side in ("predicted", "measured"):
        assert f"{report[side]['peak']['allocated_bytes']:,} B" in out
    assert f"{100 * report['relative_error']['allocated_bytes']:+.4f} %" in out
    assert f"loss {report['first_loss']:.4f} -> {report['last_loss']:.4f}" in out
    assert out.splitlines()[-1] == f"written: {output}"
    assert "step 1/6" not in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(
    number: int, arguments: list[str], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first signal lets the step end, saves and exits with 75; --resume then gives the undisturbed bits."""
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    assert main([*arguments, str(calm)]) == 0
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(tune, "step_line", signal_at(3, number))
        assert main([*arguments, str(disturbed)]) == 75
    assert signal.getsignal(number) is before
    assert "stopped after step 3 of 6; go on with the same command and --resume" in capsys.readouterr().err
    assert not disturbed.exists()
    assert main([*arguments, str(disturbed), "--resume"]) == 0
    assert "step 3/6" not in capsys.readouterr().err
    assert weights(disturbed) == weights(calm)
    assert losses(disturbed) == losses(calm)


def test_a_second_signal_stops_at_once(
    arguments: list[str], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second signal ends with 130, one line and no save; the checkpoint before it goes on."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(tune, "step_line", signal_at(3, signal.SIGINT, signal.SIGINT))
        assert main([*arguments, str(output)]) == 130
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "brim: stopped by Ctrl-C"
    assert [path.name for path in checkpoints_of(output).iterdir()] == ["step-00000002"]
    assert main([*arguments, str(output)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*arguments, str(output), "--resume"]) == 0
    assert "step 3/6" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize(("module", "name"), [(start, "tokenize"), (loop, "build")])
def test_a_signal_before_training(
    module: Any, name: str, number: int, code: int,
    arguments: list[str], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """While data and model are prepared a signal ends the command at once and leaves nothing."""
    real = getattr(module, name)

    def signalled(*values: Any, **named: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*values, **named)

    monkeypatch.setattr(module, name, signalled)
    assert main([*arguments, str(tmp_path / "out")]) == code
    assert "stopped by" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["data.txt"]


DRIVER = """
import sys
import {module} as tests
from brim.cli import main, tune
tune.step_line = tests.signal_at({step}, {number})
sys.exit(main(sys.argv[1:]))
"""


def start_and_signal(arguments: list[str], step: int, number: int, **streams: Any) -> int:
    """The exit code of a process of its own that gets a signal at a step."""
    here = Path(__file__)
    code = DRIVER.format(module=here.stem, step=step, number=int(number))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",  # as this process: another number may add in another order
        "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path]),
        "COLUMNS": "150",
    }
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, **streams).returncode


def all_of(terminal: int) -> str:
    """What was written to the other end, which is closed: a terminal hands on some 4 KiB at a time."""
    parts = []
    while True:
        try:
            parts.append(os.read(terminal, 2**16))
        except OSError:  # Linux's way to say that there is no more
            return b"".join(parts).decode(errors="replace")


def test_processes_that_are_stopped_and_killed(arguments: list[str], tmp_path: Path, capsys: Captured) -> None:
    """A terminal shows a live line; after SIGTERM (75) and SIGKILL the run still ends as an undisturbed one."""
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    assert main([*arguments, str(calm)]) == 0
    ours, theirs = pty.openpty()
    command = [*arguments, str(disturbed)]
    assert start_and_signal(command, 3, signal.SIGTERM, stderr=theirs, stdout=subprocess.DEVNULL) == 75
    os.close(theirs)
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", all_of(ours))
    os.close(ours)
    assert re.search(r"step 3/6  loss [\d.]+  \S+ tokens/s  memory \S+ KiB, peak \S+ KiB  \S+ m?s left", shown)
    assert "stopped after step 3 of 6; go on with the same command and --resume" in shown
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    assert start_and_signal([*command, "--resume"], 5, signal.SIGKILL, **quiet) == -signal.SIGKILL
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    err = capsys.readouterr().err
    assert "step 5/6" in err
    assert "step 4/6" not in err
    assert weights(disturbed) == weights(calm)
    assert losses(disturbed) == losses(calm)


def test_libraries_keep_quiet(arguments: list[str], tmp_path: Path) -> None:
    """Of all that PEFT, transformers, torch and TensorBoard have to say nothing reaches the user."""
    options = ["--method", "lora", "--set", "memory.activation_checkpointing=full", "--set", "memory.loss=chunked"]
    done = subprocess.run(
        [sys.executable, "-m", "brim.cli", *arguments, str(tmp_path / "out"), *options, "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["steps"] == 6
    strange = [line for line in done.stderr.splitlines() if not re.match(r"preparing |data: |run: |step \d/6 ", line)]
    assert strange == []


def test_nothing_to_resume(arguments: list[str], tmp_path: Path, capsys: Captured) -> None:
    """--resume in a place without a run says so and starts, so that a scheduler may always pass it."""
    assert main([*arguments, str(tmp_path / "out"), "--resume"]) == 0
    assert "nothing to resume" in capsys.readouterr().err


def test_settings_without_effect(arguments: list[str], tmp_path: Path, capsys: Captured) -> None:
    """What a setting does not do is said before the run."""
    options = ["--set", "training.evaluate_every=2", "--set", "training.epochs=3", "--set", "lora.rank=4"]
    assert main([*arguments, str(tmp_path / "out"), *options]) == 0
    err = capsys.readouterr().err
    for name in ("training.evaluate_every", "training.epochs", "[lora]"):
        assert f"{name} has no effect" in err


def test_refusals(arguments: list[str], tmp_path: Path, capsys: Captured) -> None:
    """Each has its exit code and one line, and nothing is left in OUTPUT's place."""
    output, broken = tmp_path / "out", tmp_path / "broken.jsonl"
    broken.write_text('{"txt": "a"}')
    without_data = [*arguments[:2], *SMALL, "--output"]
    for command, options, code, said in (
        (without_data, [], 2, "add --data FILE"),
        (arguments, ["--memory", "100KiB"], 3, "it may use; ask for one that fits"),
        (arguments, ["--data", str(broken)], 4, "did you mean text"),
        (arguments, ["--data", str(tmp_path / "none")], 4, "does not exist"),
        (arguments, ["--eval-data", str(broken)], 4, "broken.jsonl, line 1"),
        (arguments, ["--seq-len", "97"], 2, "nearest: seq_len = 96"),
        (arguments, ["--set", "lora.targets=['c_atn']", "--method", "lora"], 2, "did you mean c_attn"),
    ):
        assert main([*command, str(output), *options]) == code
        err = capsys.readouterr().err
        assert said in err.splitlines()[-1]
        assert not output.exists()
        assert not workplace_of(output).exists()
    output.mkdir()
    assert main([*arguments, str(output)]) == 2
    assert "is there already" in capsys.readouterr().err
