"""`Recipe`: all that decides memory and speed. Planned, rehearsed and executed; read from and written to TOML.

A misspelt key, a wrong kind and a combination that cannot run are refused when the recipe is read.
"""

import dataclasses
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints

import tomli_w

from brim.errors import RecipeError
from brim.recipe.reading import assign, parse_value, plain, read
from brim.recipe.rules import check_ranges, check_runs, without_effect
from brim.recipe.sections import Library, Lora, Memory, Method, Optimizer, Parallel, Precision, Qat, Task, Training


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
    """Micro-batches of one optimizer step, on each device."""
    precision: Precision = field(default_factory=Precision)
    optimizer: Optimizer = field(default_factory=Optimizer)
    memory: Memory = field(default_factory=Memory)
    training: Training = field(default_factory=Training)
    lora: Lora = field(default_factory=Lora)
    qat: Qat = field(default_factory=Qat)
    parallel: Parallel = field(default_factory=Parallel)
    library: Library = field(default_factory=Library)

    def __post_init__(self) -> None:
        check_ranges(self)
        check_runs(self)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads on all devices; source and target counted together."""
        row = self.seq_len + (self.target_len if self.task == "seq2seq-lm" else 0)
        return row * self.rows_per_step

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step on all devices."""
        return self.micro_batch_size * self.grad_accumulation * self.parallel.data_ranks

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained beside a frozen base."""
        return self.method in ("lora", "qlora")

    @property
    def updates_rounded(self) -> bool:
        """Whether updates of low rank are trained within rounded weights."""
        return self.method == "qat" and self.qat.train == "adapters"

    @property
    def has_teacher(self) -> bool:
        """Whether the model as it was before training is learned from, beside the data."""
        return self.method == "qat" and self.qat.teacher_top > 0

    @property
    def calibrates(self) -> bool:
        """Whether scales and weights to begin with are chosen by what flows through them."""
        return self.method == "qat" and self.qat.start == "calibrated"

    @property
    def trains_weights(self) -> bool:
        """Whether the model's own weights are trained."""
        return self.method == "full" or (self.method == "qat" and self.qat.train == "all")

    @property
    def plain_format(self) -> Literal["fp32", "bf16", "fp16"]:
        """Of all that is not packed: every weight, or a packed base's embeddings, norms and head; and of adapters."""
        weights = self.precision.weights
        if weights == "int8" or weights == "nf4" or weights == "int4":
            return "fp32" if self.library.frozen == "fp32" else self.precision.compute
        return weights

    @property
    def best_rounding(self) -> Literal["nearest", "stochastic"]:
        """By chance, where whole BF16 weights have no FP32 copy and it can be: to nearest, they would hardly move."""
        alone = self.precision.weights == "bf16" and self.precision.master == "none" and self.method == "full"
        can = self.optimizer.name in ("adamw", "adamw8bit") and self.library.adamw == "fused"
        copied = self.parallel.sharding not in ("none", "zero2", "zero3") or self.parallel.tensor > 1
        return "stochastic" if alone and can and not copied else "nearest"

    @property
    def target_len(self) -> int:
        """Tokens of a target row."""
        return self.target_seq_len or self.seq_len

    def to_dict(self) -> dict[str, Any]:
        """Plain values, keys in the order of the file."""
        return cast(dict[str, Any], plain(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "recipe") -> "Recipe":
        """A checked recipe. Raises RecipeError; a misspelt key names the key meant."""
        if not values.get("model"):
            raise RecipeError(f'{where}: no model; add a line such as model = "smollm2-135m"')
        return read(cls, values, where=where, prefix="")

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

    def settings(self, start: "Recipe") -> list[str]:
        """`key=value` for each key that is not as `start` has it, which `start.with_settings` reads."""
        return list(_differences(self.to_dict(), start.to_dict(), ""))

    def with_settings(self, settings: Iterable[str]) -> "Recipe":
        """A copy with `key=value` settings applied, keys dotted as in `precision.weights=fp32`."""
        values = self.to_dict()
        for setting in settings:
            key, separator, text = setting.partition("=")
            if not separator:
                raise RecipeError(f"--set {setting!r} has no '='; write --set precision.weights=fp32")
            assign(values, key.strip().split("."), parse_value(text.strip()), sections=SECTIONS, setting=setting)
        return Recipe.from_dict(values, where="--set")

    def with_values(self, values: Mapping[str, Any]) -> "Recipe":
        """A copy with values of the right kind at dotted keys: a hundred times faster than from texts."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            sections.setdefault(section, {})[name] = value
        own = sections.pop("", {})
        inner = {name: dataclasses.replace(getattr(self, name), **changed) for name, changed in sections.items()}
        return dataclasses.replace(self, **own, **inner)

    def warnings(self) -> list[str]:
        """Settings that have no effect in this recipe."""
        return without_effect(self)


SECTIONS = {line.name for line in fields(Recipe) if dataclasses.is_dataclass(get_type_hints(Recipe)[line.name])}


def _differences(values: dict[str, Any], others: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _differences(value, others[key], f"{prefix}{key}.")
        elif value != others[key]:
            yield f"{prefix}{key}={value if isinstance(value, str) else _in_toml(value)}"


def _in_toml(value: object) -> str:
    """On one line: JSON's numbers, truths and lists of texts are TOML's, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
