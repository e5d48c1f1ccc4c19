"""What learned scales win back: SmolLM2-135M on WikiText-2, trained through rounding, against rounding afterwards.

Any training on the text lowers perplexity, so the measure is against a control. C: so many steps in full precision.
R: that control rounded to nearest (absmax scales). Q: the same steps on the same rows at the same learning rate through
rounding, saved as integers and read back by transformers. recovered = (R - Q) / (R - C).

Training text: WikiText-2's validation articles but for the eight that ship with the package, which are the evaluation
text. Each finished cell is kept in PLACE and not run again; `make qat` writes docs/qat.md from them.

    qat_quality.py [--place runs/qat] [--steps 120] [--docs] [CELL ...]
"""

import argparse
import json
import logging
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from brim.inference import held_text, load, perplexity
from brim.models import describe
from brim.models.quiet import quiet_transformers
from brim.models.weights import local_directory
from brim.recipe import Memory, Optimizer, Precision, Qat, Recipe, Training
from brim.training.build import Workload, build
from brim.training.data import tokenize
from brim.training.fake_quantized import save_integers
from brim.training.layouts import Row
from brim.training.schedule import learning_rate
from brim.training.start import load_tokenizer
from brim.training.step import train_step

HERE = Path(__file__).parent
TEXT = HERE / "data" / "wikitext2_valid.txt"
DOCUMENT = HERE.parent / "docs" / "qat.md"
MODEL = "smollm2-135m"
LEARNING_RATE = 2e-4
WINDOW, STRIDE = 512, 448


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way of rounding, and how much of its damage is to be won back (0: it is only told)."""

    qat: Qat
    target: float = 0.0


CELLS = {
    "int4 group:32": Cell(qat=Qat(format="int4", granularity="group:32", start="absmax"), target=0.90),
    "int3 group:32": Cell(qat=Qat(format="int3", granularity="group:32"), target=0.75),
    "int4 channel": Cell(qat=Qat(format="int4", granularity="channel", start="absmax"), target=0.70),
    "int2 group:32": Cell(qat=Qat(format="int2", granularity="group:32", start="mean")),
}


def recipe(steps: int, qat: Qat | None) -> Recipe:
    """1,024 tokens a step; FP32 weights, products in BF16."""
    return Recipe(
        model=MODEL,
        method="full" if qat is None else "qat",
        seq_len=512,
        micro_batch_size=2,
        precision=Precision(weights="fp32", compute="bf16"),
        optimizer=Optimizer(learning_rate=LEARNING_RATE),
        memory=Memory(loss="chunked"),
        training=Training(max_steps=steps, warmup_steps=min(10, steps // 4)),
        qat=qat or Qat(),
    )


def articles(text: str) -> list[str]:
    """A heading of the first order begins each."""
    return [part for part in re.split(r"(?m)^(?= = [^=].*[^=] = \n)", text) if part.strip()]


def training_rows() -> list[Row]:
    held = {article.strip() for article in articles(held_text())}
    rows = [Row("", article) for article in articles(TEXT.read_text(encoding="utf-8")) if article.strip() not in held]
    assert len(held) == 8 and len(rows) == 52
    return rows


def train(made: Recipe, weights: Path, place: Path, name: str) -> Workload:
    """The workload at the end of the run; a line every ten steps."""
    data = tokenize(training_rows(), load_tokenizer(weights), made)
    torch.manual_seed(0)
    workload = build(made, describe(MODEL), weights=weights)
    steps = made.training.max_steps
    for step in range(steps):
        rate = learning_rate(made, step, steps)
        loss = float(train_step(workload, data.step_batches(made, step), learning_rate=rate))
        if step % 10 == 9:
            print(f"qat: {name}: step {step + 1}/{steps}, loss {loss:.4f}", flush=True)
    return workload


def integers(workload: Workload, made: Recipe, tokens_of: Path, place: Path) -> Path:
    """The model as integers in Hugging Face form."""
    save_integers(workload.base, place, made)
    load_tokenizer(tokens_of).save_pretrained(place)
    return place


def measured(directory: Path) -> float:
    """Perplexity over the evaluation text; products in BF16, as they were in training."""
    loaded = load(directory, device="cpu")
    loaded = loaded._replace(model=loaded.model.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return perplexity(loaded, held_text(), window=WINDOW, stride=STRIDE, batch_size=4).value


def control(place: Path, weights: Path, steps: int) -> Path:
    """The directory of the control, trained when it is not there."""
    directory = place / "control"
    if not (directory / "config.json").exists():
        workload = train(recipe(steps, None), weights, place, "control")
        workload.base.save_pretrained(directory)
        load_tokenizer(weights).save_pretrained(directory)
    return directory


def run_cell(name: str, place: Path, weights: Path, steps: int) -> dict[str, float]:
    made, scratch = recipe(steps, CELLS[name].qat), place / "scratch"
    nearest = made.with_settings(["qat.start=absmax"])

    def perplexity_of(key: str, workload: Workload) -> float:
        value = measured(integers(workload, made, weights, scratch))
        shutil.rmtree(scratch)
        print(f"qat: {name}: {key} {value:.3f}", flush=True)
        return value

    rounded = perplexity_of("R", build(nearest, describe(MODEL), weights=place / "control"))
    return {"R": rounded, "Q": perplexity_of("Q", train(made, weights, place, name))}


def document(kept: dict[str, dict[str, float]], steps: int) -> str:
    plain = kept["control"]
    lines = [
        "# Quantization-aware training",
        "",
        f"Written by `make qat`: SmolLM2-135M-Instruct (decoded from the 4-bit weights that ship), {steps} steps of",
        "1,024 tokens of WikiText-2's validation articles (FP32 weights, BF16 products, AdamW, learning rate "
        f"{LEARNING_RATE:g},",
        "cosine), perplexity over eight other articles of it (windows of 512 tokens, stride 448).",
        "",
        f"Before any training {plain['before']:.2f}; C, the control trained in full precision, {plain['C']:.2f}.",
        "R: that control rounded to nearest. Q: the same steps through rounding, saved as integers and read by",
        "transformers. Recovered is (R - Q) / (R - C).",
        "",
        "| weights | C | R | Q | recovered | target |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, cell in CELLS.items():
        if name in kept:
            rounded, learned = kept[name]["R"], kept[name]["Q"]
            recovered = (rounded - learned) / (rounded - plain["C"])
            target = f"{cell.target:.0%}" if cell.target else ""
            lines.append(f"| {name} | {plain['C']:.2f} | {rounded:.2f} | {learned:.2f} | {recovered:.1%} | {target} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cells", nargs="*", default=list(CELLS))
    parser.add_argument("--place", type=Path, default=Path("runs/qat"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--docs", action="store_true")
    chosen = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    chosen.place.mkdir(parents=True, exist_ok=True)
    path = chosen.place / "results.json"
    kept: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    with quiet_transformers():
        weights = local_directory(describe(MODEL))
        plain = control(chosen.place, weights, chosen.steps)
        if "control" not in kept:
            kept["control"] = {"before": measured(weights), "C": measured(plain)}
            path.write_text(json.dumps(kept, indent=1))
        for name in chosen.cells:
            if name not in kept:
                kept[name] = run_cell(name, chosen.place, weights, chosen.steps)
                assert all(map(math.isfinite, kept[name].values()))
                path.write_text(json.dumps(kept, indent=1))
    text = document(kept, chosen.steps)
    print(text)
    if chosen.docs:
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
