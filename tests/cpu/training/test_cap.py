"""A run that takes more than it may: stopped with the ledger, not killed; then gone on with by a lighter recipe."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from brim.cli import main, tune
from brim.errors import RanOutOfMemoryError
from brim.hardware.detect import detect_host
from brim.hardware.rates import quick_device
from brim.memory import cap
from brim.planning.lighter import lighter
from brim.recipe import Recipe
from brim.training import loop
from brim.training.build import Workload
from brim.training.job import Run
from brim.training.loop import run
from brim.training.metrics import StepRecord
from brim.training.step import train_step

MakeRun = Callable[..., Run]
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts a process's own memory")


@pytest.fixture(autouse=True)
def other_tests_keep_their_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cap, "map_apart", lambda: None)


_AT_THE_WALL = """
import torch
from brim.memory import cap
from brim.memory.cap import data_bytes, walled

cap.BESIDES_BYTES = 2**26
before = data_bytes()
there = torch.empty(2**28, dtype=torch.uint8)  # no page of it is touched
assert data_bytes() - before >= 2**28
with walled(2**29, allocated_bytes=2**28):
    more = torch.empty(2**28, dtype=torch.uint8)
    try:
        torch.empty(2**27, dtype=torch.uint8)
    except RuntimeError as error:
        assert "can't allocate memory" in str(error)
    else:
        raise AssertionError("it was allocated")
    del more
    torch.empty(2**28, dtype=torch.uint8)
torch.empty(2**29, dtype=torch.uint8)
with walled(None, allocated_bytes=0):
    torch.empty(2**30, dtype=torch.uint8)
"""


@linux
def test_the_wall() -> None:
    """Tensors take what they may, what was there already included; beyond it an allocation fails and nothing else does,
    and after the block it does not. In a process of its own: another's malloc has room that is counted already."""
    subprocess.run([sys.executable, "-c", _AT_THE_WALL], check=True, timeout=120)


def test_a_step_that_takes_too_much(make_run: MakeRun, tmp_path: Path) -> None:
    """The run's own peak is enough, a byte less ends it with the measured ledger, its sum, and what was predicted."""
    job = make_run("llama")
    peak = run(job).measured.peak.allocated_bytes
    run(replace(job, cap_bytes=peak, output=tmp_path / "enough"))
    with pytest.raises(
        RanOutOfMemoryError, match=r"step 2 took .*weights .*more than the .* predicted was 1000 B"
    ) as e:
        run(replace(job, cap_bytes=peak - 1, output=tmp_path / "less"))
    assert e.value.exit_code == 5


@linux
def test_an_allocation_that_the_wall_refuses(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody rehearsed fails in its step and not in the system's killer, with the ledger of that moment."""

    def greedy(workload: Workload, batches: Any, *, learning_rate: float) -> torch.Tensor:
        torch.empty(2**33, dtype=torch.uint8)
        return train_step(workload, batches, learning_rate=learning_rate)

    monkeypatch.setattr(loop, "train_step", greedy)
    with pytest.raises(RanOutOfMemoryError, match=r"out of memory with .* allocated \(weights .*predicted was 1000 B"):
        run(make_run("llama", cap_bytes=2**30))


def test_lighter_recipes_learn_the_same() -> None:
    """One lever after the other, the fastest first, until none is left; each keeps the rows of a step."""
    device = quick_device("cpu", detect_host().memory_bytes)
    recipe, steps = Recipe(model="any", micro_batch_size=6, grad_accumulation=2), list[Recipe]()
    while following := list(lighter(recipe, device)):
        assert all(other.rows_per_step == recipe.rows_per_step for other in following)
        recipe = following[0]
        steps.append(recipe)
    assert [step.micro_batch_size for step in steps] == [3, 1, 1, 1]
    assert (recipe.memory.loss, recipe.memory.activation_checkpointing) == ("chunked", "full")
    backward = Recipe(model="any").with_settings(["optimizer.in_backward=true", "optimizer.max_grad_norm=0"])
    assert all(other.grad_accumulation == 1 for other in lighter(replace(backward, micro_batch_size=4), device))


@pytest.fixture
def arguments(tiny_directory: Callable[[str], Path], tmp_path: Path) -> list[str]:
    data = tmp_path / "data.txt"
    data.write_text("Filled to the brim and never over it; measured twice, predicted once.\n" * 6)
    settings = ["precision.weights=fp32", "precision.compute=fp32", "training.max_steps=5", "training.save_every=2"]
    sets = [item for setting in settings for item in ("--set", setting)]
    return ["tune", str(tiny_directory("llama")), "--data", str(data), "--seq-len", "16", *sets, "--output"]


def ends(monkeypatch: pytest.MonkeyPatch, *, rows: int, at_step: int) -> None:
    """Memory ends at a step when as many rows go through the model at once."""
    done = 0

    def step(workload: Workload, batches: Any, *, learning_rate: float) -> torch.Tensor:
        nonlocal done
        if len(batches[0].input_ids) >= rows and done >= at_step:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")
        done += 1
        return train_step(workload, batches, learning_rate=learning_rate)

    monkeypatch.setattr(loop, "train_step", step)


def test_out_of_memory_goes_on_with_less(
    arguments: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that ends in the first step: half the rows at once and twice as often; the output is that of the lighter
    recipe from the start, and says so."""
    output, light = tmp_path / "out", tmp_path / "light"
    assert main([*arguments, str(light), "--micro-batch-size", "1", "--set", "grad_accumulation=2"]) == 0
    ends(monkeypatch, rows=2, at_step=0)
    capsys.readouterr()
    assert main([*arguments, str(output), "--micro-batch-size", "2", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["recipe"]["micro_batch_size"] == 1
    assert "going on with micro_batch_size=1, grad_accumulation=2: as many rows a step" in captured.err
    ours, theirs = (load_file(path / "model.safetensors") for path in (output, light))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert Recipe.from_toml(output / "recipe.toml").grad_accumulation == 2


def test_out_of_memory_later_goes_on_from_the_checkpoint(
    arguments: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that ends in step 4: the lighter recipe goes on from the checkpoint of step 2."""
    seen: list[int] = []

    def step_line(record: StepRecord) -> str:
        seen.append(record.step)
        return ""

    monkeypatch.setattr(tune, "step_line", step_line)
    ends(monkeypatch, rows=2, at_step=3)
    assert main([*arguments, str(tmp_path / "out"), "--micro-batch-size", "2"]) == 0
    assert seen == [1, 2, 3, 3, 4, 5]


def test_no_lighter_recipe(arguments: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every lever is pulled the run ends (5) with the ledger of that moment."""
    ends(monkeypatch, rows=1, at_step=0)
    pulled = ["--set", "memory.loss=chunked", "--set", "memory.activation_checkpointing=full"]
    assert main([*arguments, str(tmp_path / "out"), *pulled]) == 5
    assert "out of memory with" in capsys.readouterr().err.splitlines()[-1]
