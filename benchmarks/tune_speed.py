"""Fine-tuning SmolLM2-135M on a CPU: Brim's peak, speed and loss beside other trainers', in one run.

Full fine-tuning, 4 rows of 512 tokens, against transformers' Trainer with bf16=True and its defaults; LoRA against
TRL's SFTTrainer. The same rows in the same order, steps, seed, learning rate (constant) and threads, FP32 weights as
they are stored. All are measured alike: allocation events of PyTorch's profiler, the median of the steps' times after
the first two. A tool that cannot be installed is named and skipped. Steps by `BRIM_BENCH_STEPS` (8).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

import torch

from brim.cli.options import recipe_of
from brim.memory.measured import CpuMeter
from brim.models import describe
from brim.models.quiet import quiet_transformers
from brim.models.weights import local_directory
from brim.recipe import Recipe
from brim.training.build import build
from brim.training.data import tokenize
from brim.training.dataset import DataSet
from brim.training.rows import read_rows
from brim.training.start import load_tokenizer
from brim.training.step import train_step

MODEL = "smollm2-135m"
DATA = Path(__file__).parents[1] / "src" / "brim" / "training" / "data" / "gsm8k_excerpt.jsonl"
STEPS = int(os.environ.get("BRIM_BENCH_STEPS", "8"))
THREADS = torch.get_num_threads()
UNTIMED = 2
PEERS = {"trainer": None, "sft": Path(__file__).with_name("requirements-tune-peer.txt")}
"""What each needs beside what Brim needs."""


def own(method: str, *settings: str) -> Recipe:
    """What `brim tune smollm2-135m` does of itself, in the others' shape; they learn prompts, too."""
    shared = [f"training.max_steps={STEPS}", "training.schedule=constant", "training.learn=all"]
    return recipe_of(MODEL, method=method, seq_len=512, micro_batch_size=4, settings=[*shared, *settings])[0]


PLAIN = own("full", "optimizer.learning_rate=2e-5")
RECIPES = {
    "default": PLAIN,
    "all levers": PLAIN.with_settings(
        [
            "memory.activation_checkpointing=full",
            "optimizer.name=adamw8bit",
            "optimizer.in_backward=true",
            "optimizer.max_grad_norm=0",
        ]
    ),
}
"""Levers that change the arithmetic: BF16 weights, how updates are rounded, 8-bit states, no clipping."""
LORA = own("lora", "optimizer.learning_rate=2e-4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Of one run."""

    peak_bytes: int
    seconds: list[float]
    losses: list[float]

    @property
    def tokens_per_s(self) -> float:
        return PLAIN.tokens_per_step / statistics.median(self.seconds[UNTIMED:])

    def beside(self, other: "Result") -> str:
        apart = max(abs(ours / theirs - 1) for ours, theirs in zip(self.losses, other.losses, strict=True))
        return (
            f"{self.peak_bytes / 1e9:.2f} GB, {self.tokens_per_s:.0f} tokens/s, loss {self.losses[-1]:.4f}: "
            f"{self.peak_bytes / other.peak_bytes:.2f} x the peak, {self.tokens_per_s / other.tokens_per_s:.2f} x the "
            f"speed, losses at most {apart:.2%} apart"
        )


def ours(recipe: Recipe, data: DataSet, weights: Path) -> Result:
    seconds, losses = [], []
    torch.manual_seed(recipe.training.seed)
    with CpuMeter() as meter:
        workload = build(recipe, describe(MODEL), weights=weights)
        meter.start_over()  # loading maps the weights' file, which is page cache
        for step in range(STEPS):
            batches = data.step_batches(recipe, step)
            started = time.perf_counter()
            losses.append(float(train_step(workload, batches, learning_rate=recipe.optimizer.learning_rate)))
            seconds.append(time.perf_counter() - started)
            meter.sample()
    return Result(peak_bytes=meter.peak.allocated_bytes, seconds=seconds, losses=losses)


def peer(name: str, recipe: Recipe, data: DataSet, weights: Path, place: Path) -> Result | str:
    """The other trainer's run over the rows that Brim's steps have; or why there is none."""
    batches = [batch for step in range(STEPS) for batch in data.step_batches(recipe, step)]
    # A label of ours is the next token, one of theirs the token itself; where a row is not full, neither has one.
    labels = [[-100, *row[:-1].tolist()] for batch in batches for row in batch.labels]
    job = {
        "model": str(weights), "place": str(place / "out"), "steps": STEPS, "rows": recipe.micro_batch_size,
        "learning_rate": recipe.optimizer.learning_rate, "seed": recipe.training.seed, "threads": THREADS,
        "rank": recipe.lora.rank, "alpha": recipe.lora.alpha, "labels": labels,
        "input_ids": [row.tolist() for batch in batches for row in batch.input_ids],
    }  # fmt: skip
    path = place / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    found = environment(place / name, PEERS[name])
    if found is None:
        return f"cannot be installed here: {PEERS[name]}"
    python, paths = found
    script = Path(__file__).with_name("tune_peer.py")
    run = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [str(part) for part in (python, "-W", "ignore", script, name, path)]
    done = subprocess.run(command, capture_output=True, text=True, env=run)
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}"
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def environment(home: Path, packages: Path | None) -> tuple[Path, list[str]] | None:
    """A Python that has these packages of its own before those of this environment; None where pip has none."""
    shared = [path for path in sys.path if path.endswith(("site-packages", "src"))]
    if packages is None:
        return Path(sys.executable), shared
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, system_site_packages=False, with_pip=True)
    command = [str(python), "-m", "pip", "install", "-q", "--no-deps", "-r", str(packages)]
    if subprocess.run(command, capture_output=True, text=True).returncode:
        return None
    return python, [str(next((home / "lib").glob("python*/site-packages"))), *shared]


def same_rows(data: DataSet) -> DataSet:
    """Rows whose last token has no target: other trainers shift labels within a row."""
    labels = data.labels.clone()
    labels[:, -1] = -100
    return DataSet(input_ids=data.input_ids, labels=labels)


def main() -> None:
    weights = local_directory(describe(MODEL))
    data = same_rows(tokenize(read_rows(DATA), load_tokenizer(weights), PLAIN))
    with tempfile.TemporaryDirectory() as directory, quiet_transformers():
        for name, base, labels in (("trainer", PLAIN, RECIPES), ("sft", LORA, {"LoRA": LORA})):
            theirs = peer(name, base, data, weights, Path(directory))
            words = theirs if isinstance(theirs, str) else theirs.beside(theirs)
            print(f"tune: {name} {words}", flush=True)
            for label, recipe in labels.items():
                result = ours(recipe, data, weights)
                print(
                    f"tune: Brim, {label}: {result.beside(result if isinstance(theirs, str) else theirs)}", flush=True
                )


if __name__ == "__main__":
    main()
