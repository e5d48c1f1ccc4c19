"""`Recipe`: all that decides memory and speed. Planned, rehearsed and executed; read from and written to TOML.

Every key is a field here, its kind a `Literal`, its default the dataclass's. A misspelt key, a wrong kind and a
combination that cannot run are refused when the recipe is read.
"""

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import tomli_w

from brim.errors import RecipeError, did_you_mean

Method = Literal["full", "lora", "qlora", "qat"]
Task = Literal["causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    weights: Literal["fp32", "bf16", "fp16", "int8", "nf4"] = "bf16"
    """As stored on the device."""
    compute: Literal["fp32", "bf16", "fp16"] = "bf16"
    """What matmuls run in."""
    master: Literal["fp32", "none"] = "none"
    """Copy of the trainable weights that the optimizer keeps and updates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    name: Literal["adamw", "adamw8bit", "adafactor", "sgd", "lion"] = "adamw"
    """States beside each weight: adamw two of its size, sgd (momentum 0.9) and lion one, adafactor a row and a column.
    Their learning rates differ: sgd's is often 100 times adamw's, lion's a third to a tenth."""
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    in_backward: bool = False
    """Each weight is stepped as soon as backward has its gradient, which is then freed: all never exist at once. Needs
    grad_accumulation = 1 and max_grad_norm = 0, which want them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What blocks recompute in backward: nothing, all but their linears' results, or everything from their input on."""
    loss: Literal["full", "chunked"] = "full"
    attention: Literal["eager", "sdpa", "flash"] = "sdpa"
    offload: Literal["none", "optimizer", "all"] = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    epochs: int = 1
    max_steps: int = 0
    """Ends the run earlier or later than `epochs` would; 0 leaves it to `epochs`."""
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    save_every: int = 0
    """Steps between checkpoints; 0: only when the run is interrupted."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: only at the end, when evaluation data is given."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ("all-linear",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qat:
    format: str = "int4"
    granularity: str = "group:32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Whose code runs: Brim's own, or other libraries' way of the same step, to compare with a run of theirs."""

    loss: Literal[
        "brim", "transformers-16bit", "transformers-4.40", "transformers-4.46", "transformers-4.50", "held", "litgpt"
    ] = "brim"
    """What each holds is said in training/generations.py."""
    cross_entropy: Literal["operators", "in-place"] = "operators"
    """in-place: one kernel that writes the logits' gradient over them (unsloth, fms-acceleration)."""
    adamw: Literal["fused", "foreach"] = "fused"
    """foreach is PyTorch's default on a GPU: its temporaries are as large as the parameters."""
    adapters: Literal["weights", "fp32"] = "weights"
    """Format of adapters: of the weights, or FP32 (PEFT's `autocast_adapter_dtype`, its default)."""
    norm: Literal["operators", "fused"] = "operators"
    """fused: RMS norms keep their input as it is and one number a row, as Liger's and unsloth's kernels do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    nodes: int = 1
    devices_per_node: int = 1
    sharding: Literal["none", "ddp", "zero1", "zero2", "zero3", "hsdp"] = "none"
    tensor: int = 1
    pipeline: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run of training or fine-tuning."""

    model: str
    task: Task = "causal-lm"
    method: Method = "full"
    seq_len: int = 1024
    """Tokens of one row; for sequence-to-sequence, of the source."""
    target_seq_len: int = 0
    """Tokens of the target row (sequence-to-sequence only); 0: as `seq_len`."""
    num_labels: int = 2
    """Classes to tell apart (sequence-classification only)."""
    micro_batch_size: int = 1
    """Rows that go through the model at once."""
    grad_accumulation: int = 1
    """Micro-batches of one optimizer step."""
    precision: Precision = field(default_factory=Precision)
    optimizer: Optimizer = field(default_factory=Optimizer)
    memory: Memory = field(default_factory=Memory)
    training: Training = field(default_factory=Training)
    lora: Lora = field(default_factory=Lora)
    qat: Qat = field(default_factory=Qat)
    parallel: Parallel = field(default_factory=Parallel)
    library: Library = field(default_factory=Library)

    def __post_init__(self) -> None:
        _check_ranges(self)
        _check_runs(self)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads; source and target counted together."""
        row = self.seq_len + (self.target_len if self.task == "seq2seq-lm" else 0)
        return row * self.micro_batch_size * self.grad_accumulation

    @property
    def target_len(self) -> int:
        """Tokens of a target row."""
        return self.target_seq_len or self.seq_len

    def to_dict(self) -> dict[str, Any]:
        """Plain values, keys in the order of the file."""
        return cast(dict[str, Any], _plain(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "recipe") -> "Recipe":
        """A checked recipe. Raises RecipeError; a misspelt key names the key meant."""
        if not values.get("model"):
            raise RecipeError(f'{where}: no model; add a line such as model = "smollm2-135m"')
        return _read(cls, values, where=where, prefix="")

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, path: Path) -> "Recipe":
        """The recipe in this file. Raises RecipeError with the file's name."""
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"recipe {path} does not exist") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {path} is not TOML: {error}") from None
        return cls.from_dict(values, where=str(path))

    def with_settings(self, settings: Iterable[str]) -> "Recipe":
        """A copy with `key=value` settings applied, keys dotted as in `precision.weights=fp32`."""
        values = self.to_dict()
        for setting in settings:
            key, separator, text = setting.partition("=")
            if not separator:
                raise RecipeError(f"--set {setting!r} has no '='; write --set precision.weights=fp32")
            _assign(values, key.strip().split("."), _parse_value(text.strip()), setting=setting)
        return Recipe.from_dict(values, where="--set")

    def warnings(self) -> list[str]:
        """Settings that have no effect in this recipe."""
        found = []
        if self.precision.weights == "fp32" and self.precision.master == "fp32":
            found.append('precision.master = "fp32" has no effect: the weights are FP32 already')
        if self.method != "lora" and self.lora != Lora():
            found.append(f'[lora] has no effect: method is "{self.method}"')
        if self.method != "qat" and self.qat != Qat():
            found.append(f'[qat] has no effect: method is "{self.method}"')
        if self.library.loss in ("brim", "litgpt") and self.library.cross_entropy != "operators":
            found.append(f'library.cross_entropy has no effect: library.loss is "{self.library.loss}"')
        if self.optimizer.name != "adamw" and self.library.adamw != "fused":
            found.append(f'library.adamw has no effect: optimizer.name is "{self.optimizer.name}"')
        if self.method != "lora" and self.library.adapters != "weights":
            found.append(f'library.adapters has no effect: method is "{self.method}"')
        if self.task != "seq2seq-lm" and self.target_seq_len:
            found.append(f'target_seq_len has no effect: task is "{self.task}"')
        if self.task != "sequence-classification" and self.num_labels != 2:
            found.append(f'num_labels has no effect: task is "{self.task}"')
        if self.task == "sequence-classification" and self.memory.loss == "chunked":
            found.append('memory.loss = "chunked" has no effect: a classifier has one row of logits a text')
        if self.training.max_steps and self.training.warmup_steps >= self.training.max_steps:
            found.append("training.warmup_steps reaches past max_steps: the learning rate never gets to its full value")
        if self.training.max_steps and self.training.epochs != 1:
            found.append("training.epochs has no effect: training.max_steps says when the run ends")
        return found


SECTIONS = {line.name for line in fields(Recipe) if dataclasses.is_dataclass(get_type_hints(Recipe)[line.name])}

_Section = TypeVar("_Section")


def _read(section: type[_Section], values: Mapping[str, Any], *, where: str, prefix: str) -> _Section:
    hints = get_type_hints(section)
    for key in values:
        if key not in hints:
            raise RecipeError(f"{where}: unknown key {prefix + key!r}{_key_meant(key, hints, prefix)}")
    read = {key: _read_value(hints[key], value, where=where, key=prefix + key) for key, value in values.items()}
    try:
        return section(**read)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _key_meant(key: str, hints: Mapping[str, Any], prefix: str) -> str:
    """The keys of this section that look like it, or the section where it really belongs."""
    if prefix == "":
        for name in SECTIONS:
            if key in get_type_hints(get_type_hints(Recipe)[name]):
                return f"; it belongs in [{name}], as {name}.{key}"
    return did_you_mean(key, hints) or f"; known: {', '.join(hints)}"


def _read_value(hint: Any, value: Any, *, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where}: {key} is a section; write [{key}] with its keys below it")
        return _read(cast(type[Any], hint), value, where=where, prefix=f"{key}.")
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            known = [str(choice) for choice in get_args(hint)]
            raise RecipeError(
                f"{where}: {key} = {value!r} is not one of {', '.join(known)}{did_you_mean(str(value), known)}"
            )
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise RecipeError(f'{where}: {key} = {value!r} is not a list of names; write ["q_proj", "v_proj"]')
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise RecipeError(f"{where}: {key} = {value!r} is not {_WORDS[hint]}")
    return value


_WORDS = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}


def _assign(values: dict[str, Any], path: list[str], value: Any, *, setting: str) -> None:
    *sections, key = path
    for section in sections:
        if not isinstance(values.get(section), dict):
            raise RecipeError(f"--set {setting}: unknown section {section!r}{did_you_mean(section, SECTIONS)}")
        values = values[section]
    if key in SECTIONS and not sections:
        raise RecipeError(f"--set {setting}: {key} is a section; name one of its keys, as {key}.KEY=VALUE")
    values[key] = value


def _parse_value(text: str) -> Any:
    """A TOML value; a bare word is a text, so that `--set method=lora` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


_AT_LEAST = {
    "seq_len": 2, "target_seq_len": 0, "num_labels": 2, "micro_batch_size": 1, "grad_accumulation": 1,
    "training.epochs": 1, "training.max_steps": 0, "training.warmup_steps": 0, "training.save_every": 0,
    "training.evaluate_every": 0, "training.seed": 0,
    "lora.rank": 1, "lora.alpha": 1,
    "parallel.nodes": 1, "parallel.devices_per_node": 1, "parallel.tensor": 1, "parallel.pipeline": 1,
    "optimizer.weight_decay": 0, "optimizer.max_grad_norm": 0,
}  # fmt: skip


def _check_ranges(recipe: Recipe) -> None:
    for key, least in _AT_LEAST.items():
        value: Any = recipe
        for part in key.split("."):
            value = getattr(value, part)
        if not least <= value < 2**40:
            raise RecipeError(f"{key} = {value} is out of range; the least is {least}")
    if not 0 < recipe.optimizer.learning_rate < 1:
        raise RecipeError(f"optimizer.learning_rate = {recipe.optimizer.learning_rate} is not between 0 and 1")
    if not recipe.lora.targets:
        raise RecipeError('lora.targets is empty; name modules, or write ["all-linear"]')


# What this version can run. A row: the key, the values that run, the nearest value to one that does not, and why.
_RUNS: tuple[tuple[str, frozenset[object], str, str], ...] = (
    ("method", frozenset({"full", "lora"}), "lora", "low-precision bases are not built"),
    (
        "optimizer.name",
        frozenset({"adamw", "adafactor", "sgd", "lion"}),
        "adamw",
        "states of 8 bits are not built",
    ),
    ("memory.attention", frozenset({"eager", "sdpa"}), "sdpa", "FlashAttention's own package is not used"),
    ("memory.offload", frozenset({"none"}), "none", "everything stays on one device"),
    (
        "precision.weights",
        frozenset({"fp32", "bf16"}),
        "bf16",
        "FP16 needs loss scaling and integers a quantized base",
    ),
    ("precision.compute", frozenset({"fp32", "bf16"}), "bf16", "FP16 needs loss scaling"),
    ("parallel.nodes", frozenset({1}), "1", "a run uses one device"),
    ("parallel.devices_per_node", frozenset({1}), "1", "a run uses one device"),
    ("parallel.sharding", frozenset({"none"}), "none", "a run uses one device"),
    ("parallel.tensor", frozenset({1}), "1", "a run uses one device"),
    ("parallel.pipeline", frozenset({1}), "1", "a run uses one device"),
)


def _check_runs(recipe: Recipe) -> None:
    if "fp16" in (recipe.precision.weights, recipe.precision.compute) and recipe.task == "seq2seq-lm":
        raise RecipeError(
            "FP16 cannot train T5-like models: their feed-forward outputs pass 65504, FP16's largest number, and turn "
            'into Inf; nearest: precision.weights = "bf16", precision.compute = "bf16"'
        )
    for key, runnable, nearest, why in _RUNS:
        value: Any = recipe
        for part in key.split("."):
            value = getattr(value, part)
        if value not in runnable:
            raise RecipeError(f"{key} = {value} cannot run in this version ({why}); nearest: {key} = {nearest}")
    _check_in_backward(recipe)
    library = recipe.library
    if library.loss != "brim" and (recipe.memory.loss == "chunked" or recipe.task != "causal-lm"):
        raise RecipeError(
            f'library.loss = "{library.loss}" is a full loss of causal language models; nearest: library.loss = "brim"'
        )
    foreach = recipe.optimizer.name == "adamw" and library.adamw == "foreach"
    if foreach and recipe.precision.master == "fp32" and recipe.precision.weights != "fp32":
        raise RecipeError(
            'library.adamw = "foreach" steps all parameters at once, precision.master = "fp32" one by one; '
            'nearest: library.adamw = "fused"'
        )
    if recipe.precision.weights == "bf16" and recipe.precision.compute == "fp32":
        raise RecipeError(
            'precision.compute = "fp32" cannot run over precision.weights = "bf16": a matmul runs in its weights\' '
            'format or lower; nearest: precision.compute = "bf16", or precision.weights = "fp32"'
        )


def _check_in_backward(recipe: Recipe) -> None:
    if not recipe.optimizer.in_backward:
        return
    if recipe.grad_accumulation > 1:
        raise RecipeError(
            f"optimizer.in_backward = true frees each gradient when it has come, grad_accumulation = "
            f"{recipe.grad_accumulation} adds up those of all micro-batches first; nearest: grad_accumulation = 1"
        )
    if recipe.optimizer.max_grad_norm > 0:
        raise RecipeError(
            f"optimizer.in_backward = true steps before all gradients are known, optimizer.max_grad_norm = "
            f"{recipe.optimizer.max_grad_norm} needs the norm of them all; nearest: optimizer.max_grad_norm = 0"
        )


__all__ = [
    "Library",
    "Lora",
    "Memory",
    "Method",
    "Optimizer",
    "Parallel",
    "Precision",
    "Qat",
    "Recipe",
    "Task",
    "Training",
]
