"""What a plan answers to bad input, as the command line says it: the words, and the exit code."""

import json

import pytest

from brim.cli import main

Captured = pytest.CaptureFixture[str]
LLAMA = ["llama-3.1-8b", "--gpu"]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ([*LLAMA, "rtx-4900"], ["rtx-4900", "did you mean rtx-4090"]),
        (["lama-3.1-8b"], ["lama-3.1-8b", "did you mean llama-3.1-8b"]),
        ([*LLAMA, "h100", "--method", "lora", "--set", "method=full"], ["--method", "--set method"]),
        (["gpt2", "--gpu", "h100", "--seq-len", "4096"], ["seq_len = 4096", "gpt2", "--seq-len 1024"]),
        ([*LLAMA, "h100", "--gpus", "8", "--tensor", "3"], ["parallel.tensor = 3", "8 devices"]),
        ([*LLAMA, "h100", "--gpus", "6", "--tensor", "3"], ["parallel.tensor = 3", "num_attention_heads = 32"]),
        ([*LLAMA, "t4", "--set", "precision.compute=bf16"], ["precision.compute = bf16", "Tesla T4", "fp16"]),
        ([*LLAMA, "h100", "--method", "full", "--format", "nf4"], ['precision.weights = "nf4"', 'method = "full"']),
        (["flan-t5-base", "--gpu", "h100", "--format", "fp16"], ["FP16 cannot train T5", "65504", "bf16"]),
    ],
)
def test_what_is_wrong_and_what_is_nearest_are_named(asked: list[str], named: list[str], capsys: Captured) -> None:
    """One line on stderr that names both sides and the nearest that goes; exit code 2."""
    assert main(["plan", *asked, "--quick"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert all(words in said.err for words in named)


@pytest.mark.parametrize(("model", "compute"), [("smollm2-135m", {"fp16", "fp32"}), ("flan-t5-small", {"fp32"})])
def test_a_device_without_bf16_is_planned_for(model: str, compute: set[str], capsys: Captured) -> None:
    """Every recipe is in the formats that it computes in (T5 in FP32 alone), and the plan says so."""
    assert main(["plan", model, "--gpu", "t4", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["recipe"]["precision"]["compute"] for each in found["recipes"]} == compute
    assert all("bf16" not in each["recipe"]["precision"].values() for each in found["recipes"])
    assert "Tesla T4 does not compute in BF16" in found["derived"]["precision"]


@pytest.mark.parametrize("pinned", [[], ["--set", "memory.offload=none", "--set", "seq_len=256"]])
def test_nothing_fits_names_the_lightest_and_three_ways_out(pinned: list[str], capsys: Captured) -> None:
    """Exit code 3, whatever else was decided; each way has its number or says where it is told."""
    assert main(["plan", *LLAMA, "rtx-4090", "--method", "full", "--memory", "2GiB", "--quick", *pinned]) == 3
    said = capsys.readouterr().err
    ways = said.split("Ways out: ")[1].split("; ")
    assert "the lightest recipe (full, " in said and len(ways) >= 3
    assert all(any(digit.isdigit() for digit in way) or "--limits" in way for way in ways)
