"""The command line from plan to report, on the real model: what was planned is what is run and measured."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from brim.cli import main
from brim.units import parse_bytes

MODEL = "smollm2-135m"
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped excerpt of GSM8K as a file."""
    path = tmp_path_factory.mktemp("data") / "gsm8k.jsonl"
    path.write_text(resources.files("brim.training").joinpath("data", "gsm8k_excerpt.jsonl").read_text("utf-8"))
    return path


def report_of(output: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return report


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_plan_is_carried_out_within_its_budget(method: str, rows: Path, tmp_path: Path, capsys: Captured) -> None:
    """The recipe that `plan` saves for 2 GiB is run by `tune` at or under its predicted peak + 0.1 %."""
    recipe, output = tmp_path / "recipe.toml", tmp_path / "tuned"
    planned = ["plan", MODEL, "--device", "cpu", "--memory", "2GiB", "--seq-len", "64", "--method", method]
    # The largest batch is the fastest and leaves the least room; four rows keep this test short.
    assert main([*planned, "--set", "micro_batch_size=4", "--save", str(recipe)]) == 0
    tuned = ["tune", str(recipe), "--data", str(rows), "--max-steps", "2", "--memory", "2GiB", "--output", str(output)]
    assert main([*tuned, "--json"]) == 0
    capsys.readouterr()
    report = report_of(output)
    predicted, measured = (report[side]["peak"]["allocated_bytes"] for side in ("predicted", "measured"))
    assert measured <= min(1.001 * predicted, parse_bytes("2GiB"))
    # Nor is more predicted than is needed: loading, which maps the FP32 file, does not count as the run's peak.
    assert predicted <= 1.001 * measured
    assert main(["tune", str(recipe), "--data", str(rows), "--output", str(output)]) == 2


def test_predict_is_the_acceptances_figure(capsys: Captured) -> None:
    """`predict --json` on stdout is one object of the contract; its ledger adds up to its peak."""
    fp32 = ["--set", "precision.weights=fp32", "--set", "precision.compute=fp32", "--set", "memory.loss=full"]
    size = ["--seq-len", "256", "--micro-batch-size", "2"]
    assert main(["predict", MODEL, "--device", "cpu", "--method", "full", *fp32, *size, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert sum(printed["ledger"].values()) == printed["peak"]["allocated_bytes"]
    # A first trial, by other code, of this recipe for real: shared facts of the project's design.
    assert printed["peak"]["allocated_bytes"] == pytest.approx(2_604_719_176, rel=0.001)
    assert {"schema", "model", "recipe", "device", "fits", "step_time_s", "tokens_per_s", "method"} <= printed.keys()


def test_too_little_memory_names_what_is_missing(capsys: Captured) -> None:
    """Nothing fits 100 MiB: exit 3, the lightest recipe, what it lacks, and ways out."""
    assert main(["plan", MODEL, "--memory", "100MiB", "--seq-len", "64", "--set", "micro_batch_size=1"]) == 3
    said = capsys.readouterr().err
    assert "nothing fits 100 MiB" in said
    assert "more. Ways out: --memory" in said


def test_a_recipe_over_the_budget_is_not_started(rows: Path, tmp_path: Path, capsys: Captured) -> None:
    """`tune` refuses with exit 3 before anything is loaded or written."""
    argv = [
        "tune",
        MODEL,
        "--data",
        str(rows),
        "--seq-len",
        "64",
        "--memory",
        "300MiB",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(argv) == 3
    assert "needs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_picture_appears_whole(suffix: str, tmp_path: Path, capsys: Captured) -> None:
    """`--plot` writes a picture of the kind that its name says, and nothing beside it."""
    path = tmp_path / "pictures" / f"ledger{suffix}"
    assert main(["predict", MODEL, "--seq-len", "32", "--method", "lora", "--quick", "--plot", str(path)]) == 0
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == ".png" else b"<?xml" in start
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_picture_of_another_kind_is_refused_at_once(tmp_path: Path, capsys: Captured) -> None:
    """An ending that cannot be drawn is a usage error before the work starts."""
    assert main(["predict", MODEL, "--plot", str(tmp_path / "ledger.gif")]) == 2
    assert ".svg or .png" in capsys.readouterr().err
