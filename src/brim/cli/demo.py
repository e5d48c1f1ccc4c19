"""`brim demo`: the whole journey on a real small model, each step the very command that a user would type."""

import json as json_module
import shlex
import shutil
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from brim import units
from brim.cli import console
from brim.errors import UsageError
from brim.models import ModelSpec, describe
from brim.numerics.formats import FORMATS
from brim.publish import write_whole

MODEL = "smollm2-135m"
BUDGET = "3GiB"
PROMPT = "A baker sells 24 rolls in the morning and half as many in the evening. How many rolls is that?"
STEPS, SEQ_LEN, EVALUATED_TOKENS, GENERATED_TOKENS = 8, 256, 4096, 64
_TRAINING_FACTOR = 6
"""Rule of thumb: weights, gradients and two moments of AdamW are 4 x the weights, activations and the rest 2 x."""
_MARK = ".brim-demo"
"""A file that says that a directory is a demo's own, to be made anew."""


def command(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where its files go; made anew each time.")] = Path(
        "demo"
    ),
) -> int:
    """The whole journey on a real small model: predict, plan, tune, quantize, evaluate, generate."""
    from brim.cli import main

    started = time.perf_counter()
    _make_place(output)
    _say(1, "What the model is, from headers alone")
    spec = describe(MODEL)
    console.out.print(_description(spec))
    _say(2, "What a model takes, by the rule of thumb (1 GB = 10^9 bytes)")
    console.out.print(_rule_of_thumb(spec))
    console.out.print(
        "The rule knows neither batch nor sequence nor method. Brim runs the step on tensors without data:"
    )
    for number, (title, argv) in enumerate(_journey(output), start=3):
        _say(number, title)
        console.out.print(f"$ brim {shlex.join(argv)}", style="bold", markup=False, soft_wrap=True)
        if code := main(argv):
            return code
    _farewell(output, time.perf_counter() - started)
    return 0


def _journey(output: Path) -> Iterator[tuple[str, list[str]]]:
    """Titles and commands; each is asked for when the one before it is done."""
    recipe, data, tuned, small = output / "recipe.toml", output / "gsm8k.jsonl", output / "tuned", output / "int8"
    shape = ["--seq-len", str(SEQ_LEN)]
    fp32 = ["--set", "precision.weights=fp32", "--set", "precision.compute=fp32"]
    yield "This model's own ledger: all weights trained in FP32", ["predict", MODEL, *shape, *fp32]
    yield (
        f"The fastest recipe that fits {BUDGET}",
        ["plan", MODEL, "--memory", BUDGET, *shape, "--save", str(recipe)],
    )
    write_whole(data, _excerpt())
    yield (
        f"Fine-tune that recipe on grade-school mathematics (GSM8K), {STEPS} steps",
        ["tune", str(recipe), "--data", str(data), "--max-steps", str(STEPS), "--memory", BUDGET,
         "--output", str(tuned), "--plot", str(output / "ledger.svg")],
    )  # fmt: skip
    yield "A quarter of the bytes: linear weights in INT8", ["quantize", MODEL, "--to", "int8", "--output", str(small)]
    yield (
        "What that costs: perplexity before and after",
        ["evaluate", str(small), "--baseline", MODEL, "--max-tokens", str(EVALUATED_TOKENS)],
    )
    yield "The INT8 model speaks", ["generate", str(small), PROMPT, "--max-tokens", str(GENERATED_TOKENS)]


def _make_place(output: Path) -> None:
    """An empty directory; an older demo's goes, anything else stays and is an error."""
    if output.exists() and not (output / _MARK).is_file():
        raise UsageError(f"{output} exists and is not a demo's; choose another place with --output DIR")
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / _MARK).touch()


def _say(number: int, title: str) -> None:
    console.out.print(f"\n[bold cyan]{number}. {title}[/]")


def _excerpt() -> str:
    return resources.files("brim.training").joinpath("data", "gsm8k_excerpt.jsonl").read_text(encoding="utf-8")


def _description(spec: ModelSpec) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts = {
        "model": f"{spec.name} ({spec.hub_id})",
        "parameters": f"{spec.num_parameters:,}",
        "blocks": f"{spec.num_layers} of width {spec.hidden_size}",
        "attention": f"{spec.num_heads} heads, {spec.num_kv_heads} for keys and values",
        "vocabulary": f"{spec.vocab_size:,} tokens, head {'tied' if spec.tied_head else 'of its own'}",
    }
    for name, fact in facts.items():
        table.add_row(name, fact)
    return table


def _rule_of_thumb(spec: ModelSpec) -> Table:
    """Weights in each format, and training, for a billion parameters and for this model."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("1B parameters", spec.name):
        table.add_column(name, justify="right")
    counts = (10**9, spec.num_parameters)
    for title, name in (("FP32 weights", "fp32"), ("FP16 or BF16 weights", "bf16"), ("INT8 weights", "int8")):
        table.add_row(title, *(_gigabytes(FORMATS[name].nbytes(count)) for count in counts))
    training = [_TRAINING_FACTOR * FORMATS["fp32"].nbytes(count) for count in counts]
    table.add_row(f"training in FP32, {_TRAINING_FACTOR} x", *(_gigabytes(nbytes) for nbytes in training))
    return table


def _gigabytes(nbytes: int) -> str:
    """Decimal, as model cards count: the one place that does."""
    return f"{nbytes / 10**9:.3g} GB"


def _farewell(output: Path, seconds: float) -> None:
    report = json_module.loads((output / "tuned" / "report.json").read_text(encoding="utf-8"))
    predicted, measured = (report[key]["peak"]["allocated_bytes"] for key in ("predicted", "measured"))
    error = report["relative_error"]["allocated_bytes"]
    console.out.print(
        f"\n[bold green]Done in {units.format_duration(seconds)}.[/] Predicted {units.format_bytes(predicted)}, "
        f"measured {units.format_bytes(measured)}: {error:+.4%}. Files: {output} (a picture: ledger.svg)"
    )
    console.out.print("Next:")
    for line in (
        f"brim plan {MODEL} --memory 2GiB               with less memory",
        "brim plan MODEL --method full                    with your own model",
        "brim tune recipe.toml --data FILE.jsonl          with your own data",
        "brim formats 3.14159265                          what becomes of a number in each format",
    ):
        console.out.print(f"  {line}", markup=False)
