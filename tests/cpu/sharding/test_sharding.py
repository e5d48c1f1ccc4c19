"""Sharded recipes rehearsed in one process against two and four real gloo processes.

gloo's own scratch memory is not counted (the workers keep it apart): NCCL's is not in the allocator either. Yet now and
then gloo's threads are the last to hold a buffer, and the profiler does not see them free it. That only ever adds to a
step. So a run's peak is the lowest of all steps after the first and of all ranks, whose shares are equal here: every
dimension that is divided is even.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from brim.models import ModelSpec
from brim.models.skeleton import skeleton
from brim.recipe import Recipe
from brim.rehearsal import rehearse_trace
from brim.training.batches import synthetic_batch
from brim.training.build import build
from brim.training.processes import run_ranks
from brim.training.step import train_step

TOLERANCE = 0.005
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1500, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
FP32 = ("precision.weights=fp32", "precision.compute=fp32")
CHECKPOINTED = "memory.activation_checkpointing=full"


def over(count: int, sharding: str, *settings: str) -> tuple[str, ...]:
    return (f"parallel.devices_per_node={count}", f"parallel.sharding={sharding}", *settings)


TWO: dict[str, tuple[str, ...]] = {
    "zero2": over(2, "zero2", *FP32),
    "zero3": over(2, "zero3", *FP32),
    "zero3, bf16": over(2, "zero3"),
    "zero3, mixed, chunked": over(2, "zero3", "precision.weights=fp32", "memory.loss=chunked"),
    "zero3, master, accumulated": over(2, "zero3", "precision.master=fp32", "grad_accumulation=2"),
    "zero3, lora, checkpointed": over(2, "zero3", "method=lora", CHECKPOINTED, *FP32),
}
FOUR: dict[str, tuple[str, ...]] = {
    "hsdp": ("parallel.nodes=2", *over(2, "hsdp", *FP32)),
}


@dataclass(frozen=True)
class Real:
    """What the ranks of one run saw."""

    answers: list[dict[str, Any]]

    @property
    def peak_bytes(self) -> int:
        """Of a step after the first, which makes the optimizer's states."""
        return min(min(answer["peaks"][1:]) for answer in self.answers)


def small() -> ModelSpec:
    spec = ModelSpec(name="llama", kind="directory", config=LLAMA, num_parameters=1, tied_head=False)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in skeleton(spec, dtype="bf16", attention="sdpa").parameters())
    return ModelSpec(name="llama", kind="directory", config=LLAMA, num_parameters=count, tied_head=False)


def recipe_of(settings: tuple[str, ...]) -> Recipe:
    return Recipe(model="llama", seq_len=64, micro_batch_size=2).with_settings(settings)


def run_for_real(cases: dict[str, tuple[str, ...]], count: int, place: Path) -> dict[str, Real]:
    spec = asdict(small())
    asked = [{"spec": spec, "recipe": recipe_of(settings).to_dict()} for settings in cases.values()]
    (place / "cases").write_text(json.dumps(asked))
    worker = Path(__file__).with_name("worker.py")
    assert run_ranks([sys.executable, str(worker), str(place / "cases"), str(place / "answers")], count) == 0
    answers = [json.loads((place / f"answers-{rank}").read_text()) for rank in range(count)]
    return {name: Real([answer[number] for answer in answers]) for number, name in enumerate(cases)}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Real]:
    """All cases, each run once: starting Python and torch takes longer than the steps."""
    two = run_for_real(TWO, 2, tmp_path_factory.mktemp("two"))
    return two | run_for_real(FOUR, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_rehearsed_peak_is_that_of_real_ranks(name: str, real: dict[str, Real]) -> None:
    """One process that imagines the others peaks as real ones do."""
    trace = rehearse_trace(small(), recipe_of((TWO | FOUR)[name]))
    assert trace.peak_bytes == pytest.approx(real[name].peak_bytes, rel=TOLERANCE)
    assert trace.peak_ledger().total == trace.peak_bytes


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_sharding_does_not_change_what_is_learned(name: str, real: dict[str, Real]) -> None:
    """Ranks report the losses of one process that reads all their rows, to the precision of the weights."""
    sharded = recipe_of((TWO | FOUR)[name])
    rows = sharded.parallel.data_ranks * sharded.grad_accumulation
    alone = sharded.with_settings(
        ["parallel.nodes=1", "parallel.devices_per_node=1", "parallel.sharding=none", "parallel.tensor=1",
         f"grad_accumulation={rows}"]
    )  # fmt: skip
    torch.manual_seed(0)
    workload = build(alone, small())
    batches = [synthetic_batch(alone, small(), seed=index) for index in range(rows)]
    losses = [float(train_step(workload, batches, learning_rate=1e-3)) for _ in real[name].answers[0]["losses"]]
    assert losses[-1] < losses[0]
    precise = sharded.precision.compute == "fp32"
    for answer in real[name].answers:
        assert answer["losses"] == pytest.approx(losses, rel=2e-6 if precise else 2e-3)


def test_a_wrong_split_would_show(real: dict[str, Real]) -> None:
    """The check can fail: weights that stay gathered, or other rows, are not within the tolerances."""
    stays, freed = real["zero2"], real["zero3"]
    assert stays.peak_bytes > (1 + TOLERANCE) * freed.peak_bytes
