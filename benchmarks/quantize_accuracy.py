"""`make quantize-accuracy`: what INT8 and INT4 cost SmolLM2-135M in perplexity, by how their scales are chosen.

Over the whole excerpt that ships with Brim, and over worked problems of GSM8K. The calibration saw neither: it is on
articles of WikiText-2 that are not in the excerpt. --peer PYTHON: the interpreter of an environment with
llm-compressor, whose GPTQ then gets the same tokens. DOCS: the Markdown. Ends with 1 where a target is missed.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from brim.checkpoints.calibrate import sequences
from brim.checkpoints.convert import quantize
from brim.checkpoints.targets import CalibrationText, ScaleChoice, Target
from brim.inference import held_text, load, locate, perplexity
from brim.inference.load import Loaded

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
WINDOW, STRIDE = 512, 448
MOST_RISE = 0.003
"""Of INT8 by channel, calibrated."""
LEAST_CLOSED = 0.4
"""Of the gap between INT4 with absmax scales and full precision, calibrated."""
CASES: tuple[tuple[Target, ScaleChoice], ...] = (
    ("int8", "absmax"), ("int8", "mse"), ("int8", "calibrated"),
    ("int4", "absmax"), ("int4", "mse"), ("int4", "calibrated"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Perplexities of one way, text by text."""

    to: str
    scales: str
    values: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--peer", type=Path, help="python of an environment with llm-compressor")
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    text = CalibrationText(text=calibration_text(), max_tokens=options.tokens)
    found = []
    for measured in measure(locate(MODEL), text, options.peer):
        print(f"{measured.to:5} {measured.scales:16} {measured.values}", file=sys.stderr, flush=True)
        found.append(measured)
    report = markdown(found, options.tokens)
    Console(width=160, highlight=False, soft_wrap=True).print(report, markup=False)
    if options.docs is not None:
        options.docs.write_text(report, encoding="utf-8")
    sys.exit(0 if reached(found) else 1)


def calibration_text() -> str:
    """The articles of WikiText-2's validation part that are not in the excerpt."""
    whole, held = (HERE / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8"), held_text()
    articles = re.split(r"(?m)^(?= = [^=].*[^=] = $)", whole)
    return "".join(article for article in articles if article.strip() and article.strip()[:200] not in held)


def texts() -> dict[str, str]:
    """What is judged by."""
    lines = resources.files("brim.training").joinpath("data/gsm8k_excerpt.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in lines.splitlines()[:64]]
    return {
        "WikiText-2 excerpt": held_text(),
        "GSM8K": "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows),
    }


def measure(source: Path, text: CalibrationText, peer: Path | None) -> Iterator[Measured]:
    yield Measured(to="fp32", scales="", values=perplexities(load(source, device="cpu")))
    with TemporaryDirectory() as place:
        for to, scales in CASES:
            output = Path(place) / f"{to}-{scales}"
            calibration = text if scales == "calibrated" else None
            quantize(source, output, to=to, scales=scales, calibration=calibration)
            yield Measured(to=to, scales=scales, values=perplexities(load(output, device="cpu")))
        if peer is not None:
            save_file({"tokens": sequences(source, text)}, Path(place) / "tokens")
            for to, bits, group in (("int8", 8, 0), ("int4", 4, 32)):
                model = as_peer(source, peer, Path(place), bits=bits, group=group)
                yield Measured(to=to, scales="llm-compressor GPTQ", values=perplexities(model))


def as_peer(source: Path, python: Path, place: Path, *, bits: int, group: int) -> Loaded:
    """The model with the other tool's weights."""
    output = place / f"peer-{bits}"
    script = HERE / "quantize_accuracy_peer.py"
    paths = [str(path) for path in (python, script, source, place / "tokens", output)]
    subprocess.run([*paths, str(bits), str(group)], check=True, stdout=sys.stderr)
    loaded = load(source, device="cpu")
    parameters = dict(loaded.model.named_parameters())
    with torch.no_grad():
        for name, weight in load_file(output).items():
            parameters[name].copy_(weight)
    return loaded


def perplexities(loaded: Loaded) -> dict[str, float]:
    return {
        name: perplexity(loaded, text, window=WINDOW, stride=STRIDE, batch_size=4).value
        for name, text in texts().items()
    }


def of(found: list[Measured], to: str, scales: str) -> Measured:
    return next(measured for measured in found if (measured.to, measured.scales) == (to, scales))


def reached(found: list[Measured]) -> bool:
    """Whether every target is, on every text."""
    exact, absmax = of(found, "fp32", "").values, of(found, "int4", "absmax").values
    int8, int4 = of(found, "int8", "calibrated").values, of(found, "int4", "calibrated").values
    return all(
        int8[name] / exact[name] - 1 <= MOST_RISE
        and (absmax[name] - int4[name]) / (absmax[name] - exact[name]) >= LEAST_CLOSED
        for name in exact
    )


def markdown(found: list[Measured], tokens: int) -> str:
    exact = of(found, "fp32", "").values
    head = " | ".join(f"{name}: perplexity | rise | gap closed" for name in exact)
    lines = [
        "# Perplexity of SmolLM2-135M in INT8 and INT4", "",
        "Written by `make quantize-accuracy`. INT8 by channel, INT4 by groups of 32, symmetric, in FP32 arithmetic;",
        "the baseline is the dequantization of the embedded Q4_1 file. Windows of",
        f"{WINDOW} tokens, stride {STRIDE}, over all of each text; calibrated on the first {tokens:,} tokens of",
        "the articles of WikiText-2's validation part that are not in the excerpt. Gap closed: of the rise",
        "with absmax scales, the share that is gone.", "",
        f"| format | scales | {head} |", "| --- | --- |" + " ---: | ---: | ---: |" * len(exact),
    ]  # fmt: skip
    for measured in found:
        cells = []
        for name, value in measured.values.items():
            cells += [f"{value:.3f}", f"{value / exact[name] - 1:+.2%}" if measured.scales else ""]
            cells.append(_closed(found, measured, name))
        lines.append(f"| {measured.to} | {measured.scales} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _closed(found: list[Measured], measured: Measured, name: str) -> str:
    if measured.scales in ("", "absmax"):
        return ""
    exact, absmax = of(found, "fp32", "").values[name], of(found, measured.to, "absmax").values[name]
    return f"{(absmax - measured.values[name]) / (absmax - exact):.0%}"


if __name__ == "__main__":
    main()
