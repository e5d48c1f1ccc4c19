"""The recipes that a plan considers, under the user's constraints."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, Literal

from brim.errors import RecipeError, UsageError
from brim.memory.bands import DEFAULT_RISK
from brim.memory.tensor import can_divide
from brim.models.spec import ModelSpec
from brim.planning.constraints import Constraints, check, check_base, value_of
from brim.planning.estimate import closed_form_band, published_band
from brim.planning.offers import Offer
from brim.planning.ranking import Candidate, Kind
from brim.planning.sweep import Batch, Sweep, with_batch
from brim.recipe import Memory, Recipe

Settings = Mapping[str, Any]
"""Recipe keys, dotted, and their values."""

_SIZES = sorted({factor * 2**power for factor in (1, 3) for power in range(8) if factor * 2**power <= 128})
"""Rows of a micro-batch where no global batch says what divides it: memory is filled to within a third."""
_DEFAULT_SEQ_LEN = 1024

_PRECISIONS: tuple[Settings, ...] = (
    {"precision.weights": "fp32", "precision.compute": "fp32", "precision.master": "none"},
    {"precision.weights": "fp32", "precision.compute": "bf16", "precision.master": "none"},
    {"precision.weights": "bf16", "precision.compute": "bf16", "precision.master": "fp32"},
    {"precision.weights": "bf16", "precision.compute": "bf16", "precision.master": "none"},
    {"precision.weights": "int8", "precision.compute": "bf16", "precision.master": "fp32"},
    {"precision.weights": "int8", "precision.compute": "bf16", "precision.master": "none"},
    {"precision.weights": "int4", "precision.compute": "bf16", "precision.master": "fp32"},
    {"precision.weights": "nf4", "precision.compute": "fp32", "precision.master": "none"},
    {"precision.weights": "nf4", "precision.compute": "bf16", "precision.master": "fp32"},
    {"precision.weights": "nf4", "precision.compute": "bf16", "precision.master": "none"},
)
_METHODS: tuple[Literal["full", "lora", "qlora"], ...] = ("full", "lora", "qlora")
_CHECKPOINTING: tuple[Settings, ...] = tuple(
    {"memory.activation_checkpointing": kind} for kind in ("none", "selective", "full")
)
_OPTIMIZERS: tuple[Settings, ...] = tuple(
    {"optimizer.name": name} for name in ("adamw", "adamw8bit", "adafactor", "lion")
)
"""Not sgd: its learning rate is no neighbour of the others'."""
_STEPPING: tuple[Settings, ...] = (
    {"optimizer.in_backward": False},
    {"optimizer.in_backward": True, "optimizer.max_grad_norm": 0.0},
)
_LOSS: tuple[Settings, ...] = tuple({"memory.loss": kind} for kind in ("full", "chunked"))
_SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "hsdp")
_LEARNING_RATES = {"adamw": 2e-5, "adamw8bit": 2e-5, "adafactor": 1e-3, "lion": 5e-6}
"""For whole models: usual starting points. Adafactor's is relative to a weight's size."""
_ADAPTERS_RATE = 2e-4


def candidates(spec: ModelSpec, constraints: Constraints) -> list[Recipe]:
    """Every different recipe to consider, in a fixed order: each kind with each of its batches."""
    return [with_batch(kind, batch) for kind, batches in kinds(spec, constraints) for batch in batches]


def kinds(spec: ModelSpec, constraints: Constraints) -> list[tuple[Recipe, tuple[Batch, ...]]]:
    """Every different recipe to consider but for its rows, in a fixed order, and the batches that it may have.

    Raises RecipeError or UsageError when the constraints contradict each other or leave nothing that can run.
    """
    check(constraints)
    base = base_recipe(spec, constraints)
    check_base(spec, base, constraints)
    found: dict[Recipe, tuple[Batch, ...]] = {}
    refusal: UsageError | None = None
    for settings in _combinations(spec, base, constraints):
        try:
            recipe = _in_whole_groups(spec, base.with_values(settings), constraints)
            if "optimizer.rounding" not in constraints.pinned:
                recipe = replace(recipe, optimizer=replace(recipe.optimizer, rounding=recipe.best_rounding))
            batches = batches_of(recipe, constraints)
        except UsageError as error:
            refusal = refusal or error
        else:
            if batches:
                found[recipe] = batches
    if not found:
        raise refusal or UsageError("no recipe meets these constraints; pin fewer keys")
    return list(found.items())


def _in_whole_groups(spec: ModelSpec, recipe: Recipe, constraints: Constraints) -> Recipe:
    """INT4 by the largest groups that divide the inputs of a block's linears; layers refuse others."""
    if recipe.precision.weights != "int4" or "precision.group_size" in constraints.pinned:
        return recipe
    config = spec.config
    heads = (config.get("head_dim") or 0) * (config.get("num_attention_heads") or 0)
    inputs = [heads, config.get("hidden_size") or 0, config.get("intermediate_size") or 0]
    group = next((size for size in (128, 64, 32) if not any(width % size for width in inputs)), 128)
    return replace(recipe, precision=replace(recipe.precision, group_size=group))


def candidates_of(
    spec: ModelSpec, offer: Offer, constraints: Constraints, *, risk: float = DEFAULT_RISK, first_place: int = 0
) -> list[Candidate]:
    """The same on an offer, each with its peak and speed by closed form."""
    sweep, found = Sweep(spec, offer.device), list[Candidate]()
    place = first_place
    for recipe, batches in kinds(spec, constraints):
        published = published_band(spec, recipe, offer.device, risk)
        (low, high), (least, most) = closed_form_band(spec, recipe), published
        band = ((1 + low) * (1 + least) - 1, (1 + high) * (1 + most) - 1)
        kind = Kind(recipe=recipe, offer=offer, band=band, published=published)
        tokens = replace(recipe, micro_batch_size=1, grad_accumulation=1).tokens_per_step
        for batch, (peak_bytes, seconds) in zip(batches, sweep.numbers(recipe, batches), strict=True):
            speed = tokens * batch[0] * batch[1] / seconds
            found.append(Candidate(place, kind, batch, peak_bytes, speed))
            place += 1
    return found


def base_recipe(spec: ModelSpec, constraints: Constraints) -> Recipe:
    """The user's settings over the planner's defaults."""
    seq_len = constraints.seq_len or min(_DEFAULT_SEQ_LEN, spec.num_positions or _DEFAULT_SEQ_LEN)
    recipe = Recipe(
        model=spec.name,
        task=spec.task,
        seq_len=seq_len,
        num_labels=spec.num_labels,
        memory=Memory(attention=spec.attention),
    )
    refusal: RecipeError | None = None
    methods = _METHODS if constraints.method == "auto" else (constraints.method,)
    for method, precision in product(methods, reversed(_precisions(constraints))):
        # A pinned format may contradict one row and go with another.
        row = [f"method={method}", *(f"{key}={value}" for key, value in precision.items())]
        if not _runs(recipe, row):
            continue
        try:
            return recipe.with_settings([*row, *_spread(constraints), *constraints.settings])
        except RecipeError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _runs(recipe: Recipe, row: list[str]) -> bool:
    """Whether the planner's own settings go together: where they do not, the user's are not to blame."""
    try:
        recipe.with_settings(row)
    except RecipeError:
        return False
    return True


def _spread(constraints: Constraints) -> list[str]:
    """Several devices, sharing everything until the search says what."""
    if constraints.devices_per_node * constraints.nodes == 1:
        return []
    counts = f"parallel.devices_per_node={constraints.devices_per_node}", f"parallel.nodes={constraints.nodes}"
    return [*counts, "parallel.sharding=zero3"]


def derived(spec: ModelSpec, constraints: Constraints) -> dict[str, str]:
    """Settings that the planner fills in without searching, each with why."""
    recipe, reasons = base_recipe(spec, constraints), {}
    if constraints.seq_len is None and "seq_len" not in constraints.pinned:
        positions = spec.num_positions
        limit = f"all positions that {spec.name} knows" if positions == recipe.seq_len else "a usual row of text"
        reasons["seq_len"] = f"{recipe.seq_len}: {limit}; --seq-len changes it"
    if spec.attention == "eager" and "memory.attention" not in constraints.pinned:
        reasons["memory.attention"] = f"eager: transformers has no other for the family {spec.model_type}"
    if constraints.lacks:
        formats = "FP32" if {"bf16", "fp16"} <= constraints.lacks else "FP16 (its loss scaled) or FP32"
        reasons["precision"] = f"{formats}: {constraints.device_name} does not compute in BF16"
    if constraints.global_batch_size is None and "grad_accumulation" not in constraints.pinned:
        reasons["grad_accumulation"] = "1: no --global-batch-size was asked for, so each micro-batch is a step"
    if "optimizer.learning_rate" not in constraints.pinned:
        reasons["optimizer.learning_rate"] = (
            "2e-5 for whole models (lion 5e-6, adafactor 1e-3), 2e-4 for adapters: usual starting points"
        )
    return reasons


def _combinations(spec: ModelSpec, base: Recipe, constraints: Constraints) -> Iterator[dict[str, Any]]:
    """Settings of each candidate. A pinned key is not varied: a row that says otherwise is left out."""
    axes = (
        _methods(base, constraints),
        _precisions(constraints),
        _CHECKPOINTING,
        _LOSS,
        _OPTIMIZERS,
        _STEPPING if base.parallel.devices == 1 else _STEPPING[:1],
        _offloads(constraints),
        _spreads(spec, base),
    )
    open_axes = [_allowed(rows, base, constraints.pinned) for rows in axes]
    for rows in product(*open_axes):
        settings = {key: value for row in rows for key, value in row.items()}
        method = settings.get("method", base.method)
        if _is_idle(settings, method, constraints.pinned):
            continue
        if "optimizer.learning_rate" not in constraints.pinned:
            name = settings.get("optimizer.name", base.optimizer.name)
            adapts = method in ("lora", "qlora")
            settings["optimizer.learning_rate"] = _ADAPTERS_RATE if adapts else _LEARNING_RATES.get(name, 2e-5)
        yield settings


def _is_idle(settings: Settings, method: str, pinned: frozenset[str]) -> bool:
    """Whether a combination can gain nothing over another."""
    offload, steps_in_backward = settings.get("memory.offload"), settings.get("optimizer.in_backward")
    is_adamw = settings.get("optimizer.name", "adamw") == "adamw"
    # What crosses the link costs more than making it again: blocks' inputs go first, and weights after them.
    if offload in ("activations", "all") and settings.get("memory.activation_checkpointing") == "none":
        return True
    # A host steps what its device alone has.
    shared = settings.get("parallel.tensor", 1) > 1 or settings.get("parallel.sharding") in ("ddp", "zero1")
    if shared and offload not in (None, "none"):
        return True
    if method == "full":
        # the states that are worth offloading are AdamW's: others have few, and in backward all are stepped one by one
        return offload in ("optimizer", "all") and not (is_adamw and not steps_in_backward)
    # Frozen FP32 weights under autocast keep a 16-bit copy of each: more memory than either format alone.
    mixed = method == "lora" and _is_mixed(settings) and not {"precision.weights", "precision.compute"} & pinned
    # Adapters have few states and gradients: nothing to gain by rounding, moving or freeing them.
    return mixed or not is_adamw or offload == "optimizer" or bool(steps_in_backward)


def _precisions(constraints: Constraints) -> tuple[Settings, ...]:
    """In formats that the device computes in: FP16 for BF16, or FP32 alone."""
    rows = _PRECISIONS
    if "bf16" in constraints.lacks:
        rows = tuple({key: "fp16" if value == "bf16" else value for key, value in row.items()} for row in rows)
    return tuple(row for row in rows if not constraints.lacks & set(row.values()))


def _spreads(spec: ModelSpec, base: Recipe) -> tuple[Settings, ...]:
    """What several devices may divide; each candidate's own rules refuse what does not go with it."""
    parallel = base.parallel
    if parallel.devices == 1:
        return ({},)
    widths = {parallel.tensor, *(2**power for power in range(parallel.devices_per_node.bit_length()))}
    rows = []
    for width in sorted(widths):
        if parallel.devices_per_node % width == 0 and can_divide(spec, width):
            shardings = _shardings(base, width) if parallel.devices > width else ("none",)
            rows += [{"parallel.tensor": width, "parallel.sharding": kind} for kind in shardings]
    return tuple(rows)


def _shardings(base: Recipe, width: int) -> tuple[str, ...]:
    """Of groups of `width` devices that share each matrix: these hold no copies, and one node has no other to copy."""
    if width > 1:
        return "zero2", "zero3"
    return _SHARDINGS if base.parallel.nodes > 1 else tuple(kind for kind in _SHARDINGS if kind != "hsdp")


def _offloads(constraints: Constraints) -> tuple[Settings, ...]:
    kinds = ("none", "optimizer", "activations", "all") if constraints.may_offload else ("none",)
    return tuple({"memory.offload": kind} for kind in kinds)


def _is_mixed(settings: Settings) -> bool:
    return settings.get("precision.weights") == "fp32" and settings.get("precision.compute") in ("bf16", "fp16")


def _allowed(rows: tuple[Settings, ...], base: Recipe, pinned: frozenset[str]) -> list[dict[str, Any]]:
    """Rows that agree with the pinned keys, without them; if none agrees, every row with them overruled."""
    agreeing = [row for row in rows if all(value_of(base, key) == row[key] for key in row.keys() & pinned)]
    return [{key: value for key, value in row.items() if key not in pinned} for row in agreeing or rows]


def _methods(base: Recipe, constraints: Constraints) -> tuple[Settings, ...]:
    if "method" in constraints.pinned:
        return ({"method": base.method},)
    names = _METHODS if constraints.method == "auto" else (constraints.method,)
    return tuple({"method": name} for name in names)


def batches_of(kind: Recipe, constraints: Constraints) -> tuple[Batch, ...]:
    """Micro-batch and accumulation of each recipe of a kind. With a global batch: every micro-batch that divides it.

    Raises UsageError where the devices cannot share its rows.
    """
    rows, pinned, ranks = constraints.global_batch_size, constraints.pinned, kind.parallel.data_ranks
    sizes = [kind.micro_batch_size] if "micro_batch_size" in pinned else _SIZES
    if rows is None:
        return tuple((size, kind.grad_accumulation) for size in sizes)
    if rows % ranks:
        raise UsageError(
            f"--global-batch-size {rows} and {ranks} devices contradict each other: each device takes as many rows; "
            f"nearest: --global-batch-size {max(1, rows // ranks) * ranks}"
        )
    rows //= ranks
    if "micro_batch_size" not in pinned:
        sizes = list(range(1, min(rows, _SIZES[-1]) + 1))
    pairs = [(size, rows // size) for size in sizes if rows % size == 0]
    if "grad_accumulation" in pinned:
        pairs = [pair for pair in pairs if pair[1] == kind.grad_accumulation]
    if not pairs:
        raise UsageError(
            f"--global-batch-size {constraints.global_batch_size} is not micro_batch_size x grad_accumulation as "
            "pinned by --set; leave one of the three open"
        )
    return tuple(pair for pair in pairs if pair[1] == 1 or not kind.optimizer.in_backward)
