"""The recipes that a plan considers, under the user's constraints."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from brim.errors import RecipeError, UsageError
from brim.models.spec import ModelSpec
from brim.recipe import Memory, Recipe

Settings = Mapping[str, Any]
"""Recipe keys, dotted, and their values."""

_LARGEST_MICRO_BATCH = 32
_DEFAULT_SEQ_LEN = 1024

_PRECISIONS: tuple[Settings, ...] = (
    {"precision.weights": "fp32", "precision.compute": "fp32", "precision.master": "none"},
    {"precision.weights": "fp32", "precision.compute": "bf16", "precision.master": "none"},
    {"precision.weights": "bf16", "precision.compute": "bf16", "precision.master": "fp32"},
    {"precision.weights": "bf16", "precision.compute": "bf16", "precision.master": "none"},
    {"precision.weights": "int8", "precision.compute": "bf16", "precision.master": "fp32"},
    {"precision.weights": "int8", "precision.compute": "bf16", "precision.master": "none"},
    {"precision.weights": "nf4", "precision.compute": "fp32", "precision.master": "none"},
    {"precision.weights": "nf4", "precision.compute": "bf16", "precision.master": "fp32"},
    {"precision.weights": "nf4", "precision.compute": "bf16", "precision.master": "none"},
)
_METHODS: tuple[Literal["full", "lora", "qlora"], ...] = ("full", "lora", "qlora")
_CHECKPOINTING: tuple[Settings, ...] = tuple({"memory.activation_checkpointing": kind} for kind in ("none", "full"))
_OPTIMIZERS: tuple[Settings, ...] = tuple({"optimizer.name": name} for name in ("adamw", "adamw8bit"))
_LOSS: tuple[Settings, ...] = tuple({"memory.loss": kind} for kind in ("full", "chunked"))
_SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "hsdp")
_LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4, "qat": 2e-5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What the user has decided; the planner decides the rest."""

    method: Literal["auto", "full", "lora", "qlora", "qat"] = "auto"
    seq_len: int | None = None
    """None: 1024, or as many as the model knows positions if that is less."""
    global_batch_size: int | None = None
    """Rows of an optimizer step, in micro-batches that divide it; None: one micro-batch of any size is a step."""
    devices_per_node: int = 1
    nodes: int = 1
    may_offload: bool = False
    """Whether the device has a host with memory of its own."""
    settings: tuple[str, ...] = ()
    """`key=value` of any recipe key, as for `Recipe.with_settings`."""

    @property
    def pinned(self) -> frozenset[str]:
        """Keys that the settings decide."""
        return frozenset(setting.partition("=")[0].strip() for setting in self.settings)


def candidates(spec: ModelSpec, constraints: Constraints) -> list[Recipe]:
    """Every different recipe to consider, in a fixed order.

    Raises RecipeError or UsageError when the constraints contradict each other or leave nothing that can run.
    """
    _check(constraints)
    base = base_recipe(spec, constraints)
    found: dict[Recipe, None] = {}
    refusal: RecipeError | None = None
    for settings in _combinations(base, constraints):
        try:
            recipe = base.with_values(settings)
        except RecipeError as error:
            refusal = refusal or error
        else:
            found[recipe] = None
    if not found:
        raise refusal or UsageError("no recipe meets these constraints; pin fewer keys")
    return list(found)


def base_recipe(spec: ModelSpec, constraints: Constraints) -> Recipe:
    """The user's settings over the planner's defaults."""
    seq_len = constraints.seq_len or min(_DEFAULT_SEQ_LEN, num_positions(spec) or _DEFAULT_SEQ_LEN)
    recipe = Recipe(
        model=spec.name,
        task=spec.task,
        seq_len=seq_len,
        num_labels=spec.num_labels,
        memory=Memory(attention=spec.attention),
    )
    refusal: RecipeError | None = None
    methods = _METHODS if constraints.method == "auto" else (constraints.method,)
    for method, precision in product(methods, reversed(_PRECISIONS)):
        # A pinned format may contradict one row and go with another.
        row = [f"method={method}", *(f"{key}={value}" for key, value in precision.items())]
        try:
            return recipe.with_settings([*row, *_spread(constraints), *constraints.settings])
        except RecipeError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _spread(constraints: Constraints) -> list[str]:
    """Several devices, sharing everything until the search says what."""
    if constraints.devices_per_node * constraints.nodes == 1:
        return []
    counts = f"parallel.devices_per_node={constraints.devices_per_node}", f"parallel.nodes={constraints.nodes}"
    return [*counts, "parallel.sharding=zero3"]


def num_positions(spec: ModelSpec) -> int | None:
    """Positions that the model was made for, if its config says."""
    return spec.first("max_position_embeddings", "n_positions", default=0) or None


def derived(spec: ModelSpec, constraints: Constraints) -> dict[str, str]:
    """Settings that the planner fills in without searching, each with why."""
    recipe, reasons = base_recipe(spec, constraints), {}
    if constraints.seq_len is None and "seq_len" not in constraints.pinned:
        positions = num_positions(spec)
        limit = f"all positions that {spec.name} knows" if positions == recipe.seq_len else "a usual row of text"
        reasons["seq_len"] = f"{recipe.seq_len}: {limit}; --seq-len changes it"
    if spec.attention == "eager" and "memory.attention" not in constraints.pinned:
        reasons["memory.attention"] = f"eager: transformers has no other for the family {spec.model_type}"
    if constraints.global_batch_size is None and "grad_accumulation" not in constraints.pinned:
        reasons["grad_accumulation"] = "1: no --global-batch-size was asked for, so each micro-batch is a step"
    if "optimizer.learning_rate" not in constraints.pinned:
        reasons["optimizer.learning_rate"] = "2e-5 for full fine-tuning, 2e-4 for adapters: usual starting points"
    return reasons


def _check(constraints: Constraints) -> None:
    both = {"method": constraints.method != "auto", "seq_len": constraints.seq_len is not None}
    for key, given in both.items():
        if given and key in constraints.pinned:
            raise UsageError(f"--{key.replace('_', '-')} and --set {key}=... both decide {key}; give one of them")
    if constraints.global_batch_size is not None and constraints.global_batch_size < 1:
        raise UsageError(f"--global-batch-size {constraints.global_batch_size} is out of range; the least is 1")


def _combinations(base: Recipe, constraints: Constraints) -> Iterator[dict[str, Any]]:
    """Settings of each candidate. A pinned key is not varied: a row that says otherwise is left out."""
    axes = (
        _methods(base, constraints),
        _PRECISIONS,
        _batches(base, constraints),
        _CHECKPOINTING,
        _LOSS,
        _OPTIMIZERS,
        _offloads(constraints),
        _shardings(base),
    )
    open_axes = [_allowed(rows, base, constraints.pinned) for rows in axes]
    for rows in product(*open_axes):
        settings = {key: value for row in rows for key, value in row.items()}
        method = settings.get("method", base.method)
        # Frozen FP32 weights under autocast keep a BF16 copy of each: more memory than either format alone.
        if (
            method == "lora"
            and _is_mixed(settings)
            and not {"precision.weights", "precision.compute"} & constraints.pinned
        ):
            continue
        # Adapters have few states: nothing to gain by rounding or moving them.
        if method != "full" and (
            settings.get("optimizer.name") == "adamw8bit" or settings.get("memory.offload") == "optimizer"
        ):
            continue
        # What crosses the link costs more than making it again: blocks' inputs go first, and weights after them.
        if (
            settings.get("memory.offload") in ("activations", "all")
            and settings.get("memory.activation_checkpointing") == "none"
        ):
            continue
        if "optimizer.learning_rate" not in constraints.pinned:
            settings["optimizer.learning_rate"] = _LEARNING_RATES.get(method, base.optimizer.learning_rate)
        yield settings


def _shardings(base: Recipe) -> tuple[Settings, ...]:
    """What several devices may divide; each candidate's own rules refuse what does not go with it."""
    if base.parallel.data_ranks == 1:
        return ({},)
    return tuple({"parallel.sharding": kind} for kind in _SHARDINGS)


def _offloads(constraints: Constraints) -> tuple[Settings, ...]:
    kinds = ("none", "optimizer", "activations", "all") if constraints.may_offload else ("none",)
    return tuple({"memory.offload": kind} for kind in kinds)


def _is_mixed(settings: Settings) -> bool:
    return (settings.get("precision.weights"), settings.get("precision.compute")) == ("fp32", "bf16")


def _allowed(rows: tuple[Settings, ...], base: Recipe, pinned: frozenset[str]) -> list[dict[str, Any]]:
    """Rows that agree with the pinned keys, without them; if none agrees, every row with them overruled."""
    agreeing = [row for row in rows if all(value_of(base, key) == row[key] for key in row.keys() & pinned)]
    return [{key: value for key, value in row.items() if key not in pinned} for row in agreeing or rows]


def value_of(recipe: Recipe, key: str) -> Any:
    """What a recipe holds under a dotted key."""
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _methods(base: Recipe, constraints: Constraints) -> tuple[Settings, ...]:
    if "method" in constraints.pinned:
        return ({"method": base.method},)
    names = _METHODS if constraints.method == "auto" else (constraints.method,)
    return tuple({"method": name} for name in names)


def _batches(base: Recipe, constraints: Constraints) -> tuple[Settings, ...]:
    """Micro-batch and accumulation. With a global batch: every micro-batch that divides it."""
    rows, pinned, ranks = constraints.global_batch_size, constraints.pinned, base.parallel.data_ranks
    sizes = [2**power for power in range(_LARGEST_MICRO_BATCH.bit_length())]
    if rows is None:
        return tuple({"micro_batch_size": size, "grad_accumulation": base.grad_accumulation} for size in sizes)
    if rows % ranks:
        raise UsageError(
            f"--global-batch-size {rows} and {ranks} devices contradict each other: each device takes as many rows; "
            f"nearest: --global-batch-size {max(1, rows // ranks) * ranks}"
        )
    rows //= ranks
    divisors = [size for size in range(1, min(rows, _LARGEST_MICRO_BATCH) + 1) if rows % size == 0]
    pairs = [(size, rows // size) for size in divisors]
    if "micro_batch_size" in pinned:
        pairs = [(base.micro_batch_size, rows // base.micro_batch_size)] if rows % base.micro_batch_size == 0 else []
    if "grad_accumulation" in pinned:
        pairs = [pair for pair in pairs if pair[1] == base.grad_accumulation]
    if not pairs:
        raise UsageError(
            f"--global-batch-size {rows} is not micro_batch_size x grad_accumulation as pinned by --set; "
            "leave one of the three open"
        )
    return tuple({"micro_batch_size": size, "grad_accumulation": count} for size, count in pairs)
