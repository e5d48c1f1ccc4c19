"""What learned scales win back: SmolLM2-135M on WikiText-2, trained through rounding, against rounding afterwards.

Any training on the text lowers perplexity, so the measure is against a control. C: so many steps in full precision.
R: that control rounded to nearest (absmax scales). Q: the same steps on the same rows at the same learning rate, the
last of them through rounding, saved as integers and read back by transformers. recovered = (R - Q) / (R - C). Beside
it torchao's QAT.

Of WikiText-2's validation articles the eight that ship with the package are the evaluation text, four others choose the
learning rate, and the rest is trained on. Each figure is kept in PLACE as soon as it is there and not made again, so a
killed run goes on where it was; `make qat` writes docs/qat.md from them.

    python -m benchmarks.qat_quality [--place runs/qat] [--steps 40] [--kept] [--docs] [CELL ...]
"""

import argparse
import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmarks.qat_peer import rounded, takes
from transformers import AutoModelForCausalLM

from brim.inference import held_text, load, perplexity
from brim.inference.load import Loaded
from brim.models import describe
from brim.models.quiet import quiet_transformers
from brim.models.weights import local_directory
from brim.recipe import Memory, Optimizer, Precision, Qat, Recipe, Training
from brim.training.build import Workload, build
from brim.training.data import tokenize
from brim.training.fake_quantized import save_integers
from brim.training.layouts import Row
from brim.training.rounding_start import exact_steps, set_rounding
from brim.training.schedule import learning_rate
from brim.training.start import load_tokenizer
from brim.training.step import train_step

HERE = Path(__file__).parent
TEXT = HERE / "data" / "wikitext2_valid.txt"
DOCUMENT = HERE.parent / "docs" / "qat.md"
MODEL = "smollm2-135m"
RATES = (2e-4, 1e-3)
"""The one with the lowest Q on the validation text is taken for all cells, controls and peers."""
SCALE_RATE = 2.0
EXACT_SHARE = 0.75
SWEPT = "int4 group:32"
WINDOW, STRIDE = 512, 448
EVERY = 13
"""Each so-maniest article is of the validation text."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way of rounding, and how much of its damage is to be won back (0: it is only told)."""

    qat: Qat
    target: float = 0.0


LEARNED = Qat(start="calibrated", exact_share=EXACT_SHARE, scale_rate=SCALE_RATE)
CELLS = {
    "int4 group:32": Cell(qat=replace(LEARNED, format="int4", granularity="group:32"), target=0.90),
    "int3 group:32": Cell(qat=replace(LEARNED, format="int3", granularity="group:32"), target=0.75),
    "int4 channel": Cell(qat=replace(LEARNED, format="int4", granularity="channel"), target=0.70),
    "int2 group:32": Cell(qat=replace(LEARNED, format="int2", granularity="group:32")),
    "int8 tensor, inputs int8": Cell(qat=replace(LEARNED, format="int8", granularity="tensor", activations="int8")),
}
PEERS = {"torchao": False, "torchao, range learning": True}
Scores = dict[str, float]


def recipe(steps: int, rate: float, qat: Qat | None = None) -> Recipe:
    """1,024 tokens a step; FP32 weights, products in BF16."""
    return Recipe(
        model=MODEL,
        method="full" if qat is None else "qat",
        seq_len=512,
        micro_batch_size=2,
        precision=Precision(weights="fp32", compute="bf16"),
        optimizer=Optimizer(learning_rate=rate),
        memory=Memory(loss="chunked"),
        training=Training(max_steps=steps, warmup_steps=min(10, steps // 4)),
        qat=qat or Qat(),
    )


def articles(text: str) -> list[str]:
    """A heading of the first order begins each."""
    return [part for part in re.split(r"(?m)^(?= = [^=].*[^=] = \n)", text) if part.strip()]


def unheld() -> list[str]:
    """All articles but those of the evaluation text."""
    held = {article.strip() for article in articles(held_text())}
    others = [article for article in articles(TEXT.read_text(encoding="utf-8")) if article.strip() not in held]
    assert len(held) == 8 and len(others) == 52
    return others


def training_rows() -> list[Row]:
    return [Row("", article) for index, article in enumerate(unheld()) if index % EVERY]


TEXTS: dict[str, Callable[[], str]] = {"validation": lambda: "".join(unheld()[::EVERY]), "evaluation": held_text}


def scores(model: Loaded) -> Scores:
    """Perplexity over each text; products in BF16, as they were in training."""
    model.model.float().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return {
            name: perplexity(model, text(), window=WINDOW, stride=STRIDE, batch_size=4).value
            for name, text in TEXTS.items()
        }


def keep(workload: Workload, path: Path) -> None:
    """What the steps that round nothing have learned, which is the same for every cell."""
    weights = {name: tensor for name, tensor in workload.base.state_dict().items() if not name.endswith(".scale")}
    torch.save({"weights": weights, "optimizer": workload.optimizer.state_dict()}, path)


def take_over(workload: Workload, path: Path) -> None:
    kept = torch.load(path, mmap=True)
    workload.base.load_state_dict(kept["weights"], strict=False)
    workload.optimizer.load_state_dict(kept["optimizer"])


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where figures are kept, and the model that all begin with."""

    place: Path
    weights: Path
    makes: bool = True
    """Otherwise figures that are not kept are no numbers."""

    @property
    def kept(self) -> dict[str, Scores]:
        path = self.place / "results.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def score(self, key: str, make: Callable[[], Scores]) -> Scores:
        """What is kept under `key`; made and kept where it is not."""
        if key not in self.kept and not self.makes:
            return dict.fromkeys(TEXTS, math.nan)
        if key not in self.kept:
            found = make()
            assert all(map(math.isfinite, found.values())), (key, found)
            (self.place / "results.json").write_text(json.dumps(self.kept | {key: found}, indent=1))
            print(f"qat: {key}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)
        return self.kept[key]

    def train(self, workload: Workload, name: str) -> Workload:
        """The workload at the end of its run; a line every ten steps."""
        made, tokenizer = workload.recipe, load_tokenizer(self.weights)
        data, steps = tokenize(training_rows(), tokenizer, made), workload.recipe.training.max_steps
        exact = exact_steps(made, steps) if made.method == "qat" else 0
        shared = self.place / f"exact-{exact}-of-{steps}-{made.optimizer.learning_rate:g}.pt"
        is_there = bool(exact) and shared.exists()
        if is_there:
            take_over(workload, shared)
        for step in range(exact if is_there else 0, steps):
            if exact and step == exact and not is_there:
                keep(workload, shared)
            if made.method == "qat":
                set_rounding(workload, data, step, steps, scratch=self.place / "hidden")
            rate = learning_rate(made, step, steps)
            loss = float(train_step(workload, data.step_batches(made, step), learning_rate=rate))
            if step % 10 == 9:
                print(f"qat: {name}: step {step + 1}/{steps}, loss {loss:.4f}", flush=True)
        return workload

    def built(self, made: Recipe, weights: Path | None = None) -> Workload:
        torch.manual_seed(0)
        return build(made, describe(MODEL), weights=weights or self.weights)

    def as_it_is(self, workload: Workload) -> Scores:
        return scores(Loaded(workload.base, load_tokenizer(self.weights)))

    def as_integers(self, workload: Workload) -> Scores:
        """Saved, and read by transformers."""
        with TemporaryDirectory(dir=self.place) as scratch:
            directory = Path(scratch) / "model"
            save_integers(workload.base, directory, workload.recipe)
            # not our loader, which keeps what is packed in layers of ours
            return scores(Loaded(AutoModelForCausalLM.from_pretrained(directory), load_tokenizer(self.weights)))

    def control(self, steps: int, rate: float) -> Path:
        """The directory of the control, trained when it is not there."""
        directory = self.place / f"control-{steps}-{rate:g}"
        if not (directory / "config.json").exists():
            workload = self.train(self.built(recipe(steps, rate)), f"C {rate:g}")
            workload.base.save_pretrained(directory)
            load_tokenizer(self.weights).save_pretrained(directory)
        return directory

    def control_scores(self, steps: int, rate: float) -> Scores:
        return self.score(f"C, {rate:g}, {steps} steps", lambda: scores(load(self.control(steps, rate), device="cpu")))

    def nearest(self, cell: str, steps: int, rate: float) -> Scores:
        made = recipe(steps, rate, replace(CELLS[cell].qat, start="absmax"))
        return self.score(
            f"R {cell}, {rate:g}, {steps} steps",
            lambda: self.as_integers(self.built(made, self.control(steps, rate))),
        )

    def learned(self, cell: str, steps: int, rate: float) -> Scores:
        made, key = recipe(steps, rate, CELLS[cell].qat), f"Q {cell}, {rate:g}, {steps} steps"
        return self.score(key, lambda: self.as_integers(self.train(self.built(made), key)))

    def of_peer(self, peer: str, cell: str, steps: int, rate: float) -> Scores:
        made, key = recipe(steps, rate, CELLS[cell].qat), f"{peer} {cell}, {rate:g}, {steps} steps"

        def make() -> Scores:
            workload = rounded(self.built(recipe(steps, rate)), made, learned=PEERS[peer])
            return self.as_it_is(self.train(workload, key))

        return self.score(key, make)


def recovered(plain: Scores, nearest: Scores, learned: Scores) -> float:
    return (nearest["evaluation"] - learned["evaluation"]) / (nearest["evaluation"] - plain["evaluation"])


def document(bench: Bench, cells: list[str], steps: int) -> str:
    """Figures that are not kept yet are made, if they may be."""
    swept = {rate: bench.learned(SWEPT, steps, rate)["validation"] for rate in RATES}
    rate = min(swept, key=lambda one: (math.isnan(swept[one]), swept[one]))
    plain = bench.control_scores(steps, rate)
    before = bench.score("before", lambda: scores(load(bench.weights, device="cpu")))
    lines = [
        "# Quantization-aware training",
        "",
        f"Written by `make qat`: SmolLM2-135M-Instruct (decoded from the 4-bit weights that ship), {steps} steps of",
        "1,024 tokens of 48 of WikiText-2's validation articles (FP32 weights, BF16 products, AdamW, cosine);",
        "perplexity over eight others (windows of 512 tokens, stride 448). Before any training it is "
        f"{before['evaluation']:.2f}.",
        "",
        "C: the control, trained in full precision. R: that control rounded to nearest. Q: the same steps on the same",
        "rows at the same learning rate, saved as integers and read by transformers. Recovered is",
        "(R - Q) / (R - C). torchao's QAT (its default, and with range learning) has the same steps, rows and rates.",
        "",
        f"Q rounds nothing in the first {EXACT_SHARE:.0%} of the steps; then scales and weights are calibrated on the",
        "rows that were read first (error feedback), and the rest of the steps is through rounding. torchao rounds",
        f"from its first step. Learning rate {rate:g}, scales at {SCALE_RATE:g} times it (torchao's, too).",
        "",
        "| weights | C | R | Q | recovered | target | torchao | its range learning |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in cells:
        nearest, learned = bench.nearest(name, steps, rate), bench.learned(name, steps, rate)
        target = f"{CELLS[name].target:.0%}" if CELLS[name].target else ""
        others = [
            f"{recovered(plain, nearest, bench.of_peer(peer, name, steps, rate)):.1%}"
            if takes(recipe(steps, rate, CELLS[name].qat))
            else "has none"
            for peer in PEERS
        ]
        row = [
            name,
            *(f"{s['evaluation']:.2f}" for s in (plain, nearest, learned)),
            f"{recovered(plain, nearest, learned):.1%}",
        ]
        lines.append("| " + " | ".join([*row, target, *others]) + " |")
    if not bench.makes:
        lines += ["", "What is empty has not been run yet."]
    lines += [
        "",
        f"The learning rate is the one with the lowest Q ({SWEPT}) on four more articles:",
        "",
        "| learning rate | Q |",
        "| --- | --- |",
        *(f"| {one:g} | {value:.2f} |" for one, value in swept.items()),
    ]
    return "\n".join([*lines, ""]).replace("nan%", "").replace("nan", "")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cells", nargs="*", default=list(CELLS))
    parser.add_argument("--place", type=Path, default=Path("runs/qat"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kept", action="store_true", help="make no figure, write those that are there")
    parser.add_argument("--docs", action="store_true")
    chosen = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    chosen.place.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        bench = Bench(place=chosen.place, weights=local_directory(describe(MODEL)), makes=not chosen.kept)
        text = document(bench, chosen.cells, chosen.steps)
    print(text)
    if chosen.docs:
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
