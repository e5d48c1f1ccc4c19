"""Sharded recipes rehearsed in one process against two and four real gloo processes, and `brim tune` over them.

A run's peak is the busiest rank's, of a plain meter around all its steps (of a divided model the least of three).
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from brim.cli import main
from brim.hardware import find
from brim.memory.constants import context_bytes
from brim.memory.trace import Trace
from brim.models import ModelSpec
from brim.models.skeleton import skeleton
from brim.recipe import Recipe
from brim.rehearsal import peak_on, rehearse_trace
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


FP16 = ("precision.weights=fp16", "precision.compute=fp16", "precision.master=fp32")
TENSOR = "parallel.tensor=2"
TWO: dict[str, tuple[str, ...]] = {
    "ddp": over(2, "ddp", *FP32),
    "ddp, int8 base": over(2, "ddp", "method=qlora", "precision.weights=int8"),
    "ddp, qat, chunked, accumulated": over(2, "ddp", "method=qat", "memory.loss=chunked", "grad_accumulation=2", *FP32),
    "zero1, master, adafactor": over(2, "zero1", "precision.master=fp32", "optimizer.name=adafactor"),
    "zero1, adamw8bit": over(2, "zero1", "optimizer.name=adamw8bit", *FP32),
    "zero2": over(2, "zero2", *FP32),
    "zero3": over(2, "zero3", *FP32),
    "zero3, mixed, chunked": over(2, "zero3", "precision.weights=fp32", "memory.loss=chunked"),
    "zero3, fp16, accumulated": over(2, "zero3", "grad_accumulation=2", *FP16),
    "zero3, lora, checkpointed": over(2, "zero3", "method=lora", CHECKPOINTED, *FP32),
    "tensor": over(2, "none", TENSOR, *FP32),
    "tensor, lora, bf16": over(2, "none", TENSOR, "method=lora", CHECKPOINTED),
    "tensor, mixed, chunked": over(2, "none", TENSOR, "precision.weights=fp32", "memory.loss=chunked"),
    "zero3, lora, fsdp1": over(2, "zero3", "method=lora", CHECKPOINTED, "library.sharding=fsdp1", *FP32),
    "zero3, lora, whole gradients": over(
        2, "zero3", "method=lora", CHECKPOINTED, "library.accumulation=whole", "grad_accumulation=2", *FP32
    ),
    "zero3, qlora": over(2, "zero3", "method=qlora", "precision.weights=nf4", "precision.compute=fp32"),
    "zero3, master on the host": over(2, "zero3", "memory.offload=optimizer", "precision.master=fp32"),
    "zero2, activations on the host": over(2, "zero2", "memory.offload=activations", *FP32),
    "zero3, all on the host": over(
        2, "zero3", "memory.offload=all", "precision.weights=fp32", "memory.loss=chunked", "grad_accumulation=2"
    ),
    "zero2, adamw8bit, by chance": over(2, "zero2", "optimizer.name=adamw8bit", "optimizer.rounding=stochastic"),
    "tensor, adamw8bit": over(2, "none", TENSOR, "optimizer.name=adamw8bit"),
    "zero3, base on the host": over(
        2, "zero3", "memory.offload=weights", "method=qlora", "precision.weights=nf4", "precision.compute=fp32"
    ),
}
FOUR: dict[str, tuple[str, ...]] = {
    "zero3 x tensor": over(4, "zero3", TENSOR, *FP32),
    "hsdp": ("parallel.nodes=2", *over(2, "hsdp", *FP32)),
}


@dataclass(frozen=True)
class Real:
    """What the ranks of one run saw."""

    answers: list[dict[str, Any]]

    @property
    def peak_bytes(self) -> int:
        return max(answer["peak_bytes"] for answer in self.answers)


def small() -> ModelSpec:
    spec = ModelSpec(name="llama", kind="directory", config=LLAMA, num_parameters=1, tied_head=False)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in skeleton(spec, dtype="bf16", attention="sdpa").parameters())
    return ModelSpec(name="llama", kind="directory", config=LLAMA, num_parameters=count, tied_head=False)


def recipe_of(settings: tuple[str, ...]) -> Recipe:
    return Recipe(model="llama", seq_len=64, micro_batch_size=2).with_settings(settings)


def training(cases: dict[str, tuple[str, ...]]) -> dict[str, dict[str, Any]]:
    spec = asdict(small())
    return {name: {"spec": spec, "recipe": recipe_of(settings).to_dict()} for name, settings in cases.items()}


def run_for_real(cases: dict[str, dict[str, Any]], count: int, place: Path) -> dict[str, Real]:
    (place / "cases").write_text(json.dumps(list(cases.values())))
    worker = Path(__file__).with_name("worker.py")
    command = [sys.executable, str(worker), str(place / "cases"), str(place / "answers")]
    assert run_ranks(command, count, environment={"OMP_NUM_THREADS": "1"}) == 0
    answers = [json.loads((place / f"answers-{rank}").read_text()) for rank in range(count)]
    return {name: Real([answer[number] for answer in answers]) for number, name in enumerate(cases)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tuned models lie."""
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def words(tiny_directory: Callable[[str], Path], place: Path) -> list[str]:
    """`tune` on a tiny model: six steps of eight rows, a checkpoint after each second."""
    (place / "data.txt").write_text("Filled to the brim and never over it; measured twice, predicted once.\n" * 6)
    (place / "held.txt").write_text("To the brim.\n" * 7)
    given = {"--data": "data.txt", "--eval-data": "held.txt"}
    options = ["--seq-len=16", "--max-steps=6", "--micro-batch-size=2", "--set=training.save_every=2"]
    precise = ["--set=precision.weights=fp32", "--set=precision.compute=fp32", "--set=optimizer.learning_rate=1e-3"]
    files = [f"{option}={place / name}" for option, name in given.items()]
    return ["tune", str(tiny_directory("llama")), *files, *options, *precise]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, words: list[str], place: Path) -> dict[str, Real]:
    """All cases, each run once: starting Python and torch takes longer than the steps."""

    def tuning(output: str, *more: str, stop_rank: int | None = None) -> dict[str, Any]:
        over_two = [*words, f"--output={place / output}", "--gpus=2", "--set=grad_accumulation=2", *more]
        return {"arguments": over_two, "stop_rank": stop_rank, "stop_step": 3}

    tunes = {
        "calm": tuning("calm"),
        "stopped": tuning("disturbed", stop_rank=1),
        "resumed": tuning("disturbed", "--resume"),
        "divided": tuning("divided", "--sharding=none", "--tensor=2", "--set=grad_accumulation=4"),
        "adapters, stopped": tuning("adapters", "--method=lora", "--sharding=zero1", stop_rank=0),
        "adapters": tuning("adapters", "--method=lora", "--sharding=zero1", "--resume"),
    }
    two = run_for_real(training(TWO) | tunes, 2, tmp_path_factory.mktemp("two"))
    return two | run_for_real(training(FOUR), 4, tmp_path_factory.mktemp("four"))


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


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1"])
def test_what_is_gathered_and_reduced_lies_in_streams_of_its_own(sharding: str) -> None:
    """Gradients lie where they were reduced, weights and activations in the computation's stream, and under FSDP1
    parameters, too, lie where they were gathered: there FSDP2 has a buffer alone, as large at most."""
    settings = over(2, "zero3", f"library.sharding={sharding}", "grad_accumulation=2", *FP32)
    trace = rehearse_trace(small(), recipe_of(settings))
    made: dict[tuple[str, bool], int] = {}
    for allocated, block in trace.events:
        if allocated:
            made[block.line, block.stream == 0] = made.get((block.line, block.stream == 0), 0) + block.nbytes
    assert ("gradients", True) not in made and made["gradients", False] > 0
    assert not {line for line, computes in made if not computes} - {"gradients", "gathered"}
    gathered = made["gathered", False], made["gathered", True]
    assert gathered[0] > gathered[1] if sharding == "fsdp1" else gathered[0] < gathered[1]


@pytest.mark.parametrize(
    ("settings", "communicators"),
    [
        ((), ()),
        (over(2, "zero3"), (2,)),
        (over(8, "ddp"), (8,)),
        (("parallel.nodes=2", *over(2, "hsdp")), (2, 2)),
        (over(8, "zero3", TENSOR), (4, 2, 8)),
    ],
)
def test_each_group_has_a_communicator(settings: tuple[str, ...], communicators: tuple[int, ...]) -> None:
    """NCCL's buffers lie outside the allocator, for each group that a rank talks in; the ledger still adds up."""
    gpu, recipe = find("a100"), recipe_of(settings)
    one = Trace()
    one.allocate(2**20, "weights")
    peak, ledger = peak_on(gpu, one, recipe)
    assert peak.device_bytes is not None
    assert peak.reserved_bytes is not None
    measured = {2: 544, 4: 688, 8: 688}
    nccl_bytes = sum(measured[size] for size in communicators) * 2**20
    assert peak.device_bytes - peak.reserved_bytes == context_bytes(gpu) + nccl_bytes
    assert ledger.total == peak.device_bytes


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    (path,) = output.glob("*.safetensors")
    return load_file(path)


def lines_of(output: Path) -> list[dict[str, float]]:
    """Without what the clock says, and a few bytes that gloo's threads let go of late."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key in ("step", "loss", "eval_loss")} for line in lines]


@pytest.mark.parametrize(("method", "outputs"), [("full", ("calm", "divided")), ("lora", ("adapters",))])
def test_two_processes_learn_what_one_does(
    method: str, outputs: tuple[str, ...], words: list[str], place: Path, real: dict[str, Real]
) -> None:
    """A step's rows do not depend on the number of processes: losses and saved weights agree, tensor by tensor."""
    alone = place / f"alone-{method}"
    assert main([*words, f"--output={alone}", f"--method={method}", "--set=grad_accumulation=4"]) == 0
    theirs = weights_of(alone)
    for spread in [place / output for output in outputs]:
        ours = weights_of(spread)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=2e-5)
        for key in ("loss", "eval_loss"):
            assert [line[key] for line in lines_of(spread) if key in line] == pytest.approx(
                [line[key] for line in lines_of(alone) if key in line], rel=1e-5
            )


def test_the_report_has_every_rank(place: Path, real: dict[str, Real]) -> None:
    """Predicted stands beside the busiest rank's measured peak, and within the tolerance of it."""
    report = json.loads((place / "calm" / "report.json").read_text())
    peaks = [rank["allocated_bytes"] for rank in report["measured"]["ranks"]]
    assert len(peaks) == 2
    assert report["measured"]["peak"]["allocated_bytes"] == max(peaks)
    assert abs(report["relative_error"]["allocated_bytes"]) < TOLERANCE


def test_a_stop_reaches_all_ranks_and_the_run_goes_on_bit_by_bit(place: Path, real: dict[str, Real]) -> None:
    """One rank is asked: both save and exit with 75; with --resume the run ends as an undisturbed one."""
    assert [answer["code"] for answer in real["stopped"].answers] == [75, 75]
    assert [answer["code"] for answer in real["resumed"].answers] == [0, 0]
    assert lines_of(place / "disturbed") == lines_of(place / "calm")
    ours, theirs = weights_of(place / "disturbed"), weights_of(place / "calm")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_killed_rank_ends_the_command(words: list[str], place: Path) -> None:
    """brim tune starts the ranks itself; when one is killed it exits with 5, says so, and leaves no process."""
    command = [sys.executable, "-m", "brim.cli", *words, f"--output={place / 'killed'}", "--gpus=2", "--max-steps=9999"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        shown = next(line for line in run.stderr if line.startswith("step 2"))
        ranks = psutil.Process(run.pid).children()
        assert len(ranks) == 2
        next(rank for rank in ranks if rank.environ()["RANK"] == "1").send_signal(signal.SIGKILL)
        shown = run.stderr.read()
        assert run.wait() == 5
    assert "rank 1 of 2 was killed" in shown
    assert not any(rank.is_running() for rank in ranks)
