"""The moments of whole runs, rehearsed and measured: levers that the matrix of exactness.py does not combine.

Each run loads weights from files, takes two steps, evaluates, saves a checkpoint, and merges its adapters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from brim.errors import RecipeError
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.rehearsal import rehearse_trace
from brim.training.trial import measured_moments

FAMILIES = ("llama", "gpt-2", "qwen3-moe", "t5")
MOMENTS = ("loading", "first step", "later steps", "evaluation", "saving", "merging")
PLAIN = {
    "fp32": ("precision.weights=fp32", "precision.compute=fp32"),
    "bf16": ("precision.weights=bf16", "precision.compute=bf16"),
}
LORA, CHECKPOINTED, CHUNKED = "method=lora", "memory.activation_checkpointing=full", "memory.loss=chunked"
IN_BACKWARD = ("optimizer.in_backward=true", "optimizer.max_grad_norm=0.0")
INT8 = ("method=qlora", "precision.weights=int8")
LEVERS: dict[str, tuple[str, ...]] = {
    "SGD": ("optimizer.name=sgd",),
    "Lion": ("optimizer.name=lion",),
    "Lion, LoRA": ("optimizer.name=lion", LORA),
    "Adafactor": ("optimizer.name=adafactor",),
    "Adafactor, in backward": ("optimizer.name=adafactor", *IN_BACKWARD),
    "Adafactor, LoRA, checkpointed": ("optimizer.name=adafactor", LORA, CHECKPOINTED),
    "AdamW of 8 bits": ("optimizer.name=adamw8bit",),
    "AdamW of 8 bits, LoRA, chunked": ("optimizer.name=adamw8bit", LORA, CHUNKED),
    "selective checkpointing": ("memory.activation_checkpointing=selective",),
    "offload optimizer": ("memory.offload=optimizer",),
    "offload activations": ("memory.offload=activations",),
    "offload activations, LoRA, checkpointed": ("memory.offload=activations", LORA, CHECKPOINTED),
    "offload weights": ("memory.offload=weights",),
    "offload weights, checkpointed, chunked": ("memory.offload=weights", CHECKPOINTED, CHUNKED),
    "offload all": ("memory.offload=all",),
    "offload all, checkpointed, 2 micro-batches": ("memory.offload=all", CHECKPOINTED, "grad_accumulation=2"),
    "offload all, LoRA": ("memory.offload=all", LORA),
    "QLoRA NF4": ("method=qlora", "precision.weights=nf4"),
    "QLoRA INT8": INT8,
    "QLoRA INT8, checkpointed, chunked": (*INT8, CHECKPOINTED, CHUNKED),
    "QLoRA INT8, offload all": (*INT8, "memory.offload=all"),
    "QLoRA INT4": ("method=qlora", "precision.weights=int4", "precision.group_size=16"),
    "QAT": ("method=qat", "qat.granularity=channel"),
    "LoRA, dropout": (LORA, "lora.dropout=0.05"),
    "DoRA": (LORA, "lora.dora=true"),
    "packed examples": ("training.packing=true",),
    "packed examples, LoRA, checkpointed": ("training.packing=true", LORA, CHECKPOINTED),
    "flash attention": ("memory.attention=flash",),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """The moments of one recipe of one family."""

    family: str
    lever: str
    precision: str
    predicted: dict[str, int]
    measured: dict[str, int]

    @property
    def errors(self) -> dict[str, float]:
        return {name: nbytes / self.measured[name] - 1 for name, nbytes in self.predicted.items()}

    @property
    def largest_error(self) -> float:
        return max(map(abs, self.errors.values()))

    @property
    def row(self) -> str:
        highest = max(self.measured[name] for name in self.predicted)
        errors = (f"{100 * self.errors[name]:+.4f}" if name in self.errors else "" for name in MOMENTS)
        words = (self.family, self.lever, self.precision, f"{max(self.predicted.values()):,}", f"{highest:,}", *errors)
        return f"| {' | '.join(words)} |"


def run(spec: ModelSpec, lever: str, precision: str) -> tuple[dict[str, int], dict[str, int]] | None:
    """Moments predicted and measured, in bytes; None where this family, or Brim, refuses the lever."""
    settings = [f"memory.attention={spec.attention}", *PLAIN[precision], *LEVERS[lever]]
    base = Recipe(model=spec.name, task=spec.task, seq_len=96, micro_batch_size=2)
    try:
        recipe = base.with_settings(settings)
        trace = rehearse_trace(spec, recipe, whole_run=True)
        with TemporaryDirectory() as place:
            measured, _ = measured_moments(spec, recipe, Path(place))
    except RecipeError:
        return None
    return dict(trace.moment_peaks()), measured


def runs(specs: Sequence[ModelSpec]) -> Iterator[tuple[ModelSpec, str, str]]:
    """(family, lever, precision) of each run."""
    for spec in specs:
        if spec.name in FAMILIES:
            for lever in LEVERS:
                for precision in PLAIN:
                    yield spec, lever, precision
