"""Plain results: ledger, prediction, plan, run report. Frozen values with `to_dict`; nothing here computes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

SCHEMA = 1
"""Version of every JSON object that Brim prints; raised when a key changes its meaning or goes away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Peak bytes by owner: each byte on exactly one line, the total derived."""

    weights: int = 0
    """Parameters and buffers, trainable or frozen."""
    gradients: int = 0
    optimizer: int = 0
    """States and master copies that live from step to step."""
    activations: int = 0
    """What forward keeps for backward, and the gradients that flow through it. In inference the cache of keys and
    values, and what a forward takes."""
    loss: int = 0
    """Logits, their upcast copies and their gradient."""
    gathered: int = 0
    """Unsharded parameters, and what is sent and received."""
    workspace: int = 0
    """Temporaries of the optimizer step, and what nobody else owns (the batch itself)."""
    context: int = 0
    """Device runtime, library handles and NCCL's buffers; 0 on a CPU."""
    fragmentation: int = 0
    """Reserved by the allocator and not in use; 0 on a CPU."""

    @property
    def total(self) -> int:
        return sum(getattr(self, line.name) for line in fields(self))

    def to_dict(self) -> dict[str, int]:
        return {line.name: getattr(self, line.name) for line in fields(self)}


LEDGER_LINES = tuple(line.name for line in fields(Ledger))


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The worst moment, three ways; None where the device has no such notion (a CPU has no reserved bytes)."""

    allocated_bytes: int
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    """Beside the device's, in the host's memory, at that memory's own worst moment: what is offloaded."""

    @property
    def highest_bytes(self) -> int:
        """What must fit: the device's peak where there is one, else what was allocated. A ledger adds up to it."""
        return self.allocated_bytes if self.device_bytes is None else self.device_bytes

    def to_dict(self) -> dict[str, int | None]:
        host = {} if self.host_bytes is None else {"host_bytes": self.host_bytes}
        return {
            "allocated_bytes": self.allocated_bytes,
            "reserved_bytes": self.reserved_bytes,
            "device_bytes": self.device_bytes,
            **host,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """What a model that writes was asked for, and what its cache takes."""

    batch_size: int
    context: int
    """Tokens of a row that are read first."""
    new_tokens: int
    """Tokens written after each row."""
    kv_cache_bytes: int
    """Of the whole cache at its largest, when the last token is written."""
    kv_cache_at_peak_bytes: int
    """Of the ledger's activations; growing, a layer holds its old and its new keys or values at once."""

    def to_dict(self) -> dict[str, int]:
        return {line.name: getattr(self, line.name) for line in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A part of a run that may surprise, and its own peak."""

    name: str
    """loading, first step, later steps, evaluation, saving, merging."""
    allocated_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "allocated_bytes": self.allocated_bytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What one recipe will take on one device, and how that was found out."""

    model: str
    recipe: Mapping[str, Any]
    """The recipe's own `to_dict`."""
    device_name: str
    budget_bytes: int
    """Memory that the run may use: the device's, or the user's cap."""
    peak: Peak
    ledger: Ledger
    step_time_s: float
    """Wall time of one optimizer step (all accumulated micro-batches); of inference: of reading and writing all."""
    tokens_per_s: float
    """Trained on; of inference: written."""
    method: Literal["rehearsal", "closed-form"]
    error_band: tuple[float, float]
    """Relative error of the peak, low and high: (-0.001, 0.001) says within 0.1 %."""
    step_time_range_s: tuple[float, float] | None = None
    """Where the step's time lay in four of five runs of this kind, the user's own where there are some; None: not
    known."""
    step_time_basis: str = ""
    """What the time was told from; `speed.bands` files its errors under it."""
    reasons: tuple[str, ...] = ()
    """Why it does not fit, and warnings about the recipe."""
    inference: Inference | None = None
    """None: the recipe is trained."""
    moments: tuple[Moment, ...] = ()
    """In order; the highest is the allocated peak. Empty where nothing was rehearsed, or the model writes."""

    @property
    def fits(self) -> bool:
        """The upper bound of the peak stays within the budget."""
        return self.peak.highest_bytes * (1 + self.error_band[1]) <= self.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        asked = {} if self.inference is None else {"inference": self.inference.to_dict()}
        return {
            "schema": SCHEMA,
            "model": self.model,
            "recipe": dict(self.recipe),
            **asked,
            "device": {"name": self.device_name, "memory_bytes": self.budget_bytes},
            "peak": self.peak.to_dict(),
            "ledger": self.ledger.to_dict(),
            **({"moments": [moment.to_dict() for moment in self.moments]} if self.moments else {}),
            "fits": self.fits,
            "step_time_s": self.step_time_s,
            "step_time_range_s": None if self.step_time_range_s is None else list(self.step_time_range_s),
            "step_time_basis": self.step_time_basis,
            "tokens_per_s": self.tokens_per_s,
            "method": self.method,
            "error_band": list(self.error_band),
            "reasons": list(self.reasons),
        }

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> "Prediction":
        """What `to_dict` was made of. Raises KeyError or TypeError for a dictionary that it did not make."""
        spread, asked = kept["step_time_range_s"], kept.get("inference")
        return cls(
            model=kept["model"],
            recipe=kept["recipe"],
            device_name=kept["device"]["name"],
            budget_bytes=kept["device"]["memory_bytes"],
            peak=Peak(**kept["peak"]),
            ledger=Ledger(**kept["ledger"]),
            step_time_s=kept["step_time_s"],
            tokens_per_s=kept["tokens_per_s"],
            method=kept["method"],
            error_band=(kept["error_band"][0], kept["error_band"][1]),
            step_time_range_s=None if spread is None else (spread[0], spread[1]),
            step_time_basis=kept["step_time_basis"],
            reasons=tuple(kept["reasons"]),
            inference=None if asked is None else Inference(**asked),
            moments=tuple(Moment(**moment) for moment in kept.get("moments", ())),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRow:
    """What equal modules hold at the peak, all together."""

    module: str
    """`model.layers.0-29.mlp.down_proj`; in brackets what no module holds."""
    count: int
    ledger: Ledger

    def to_dict(self) -> dict[str, Any]:
        return {"module": self.module, "count": self.count, "ledger": self.ledger.to_dict()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One change of a recipe, and what would then be predicted."""

    settings: tuple[str, ...]
    """`key=value` each, as `--set` takes them."""
    cost: str
    """What it costs besides time, in words."""
    saved_bytes: int
    """Off the highest peak."""
    peak_bytes: int
    fits: bool
    step_time_s: float
    tokens_per_s: float
    method: Literal["rehearsal", "closed-form"]

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": list(self.settings),
            "cost": self.cost,
            "saved_bytes": self.saved_bytes,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "step_time_s": self.step_time_s,
            "tokens_per_s": self.tokens_per_s,
            "method": self.method,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Recipes ranked for a goal. The losers stay, each with its reason."""

    model: str
    device_name: str
    """Of all that were offered."""
    budget_bytes: int
    """Of the best recipe's device."""
    goal: Literal["fastest", "lightest", "cheapest"]
    recipes: tuple[Prediction, ...]
    """Best first: rehearsed finalists that fit, other recipes that fit by closed form, then those that do not. Of many
    only the first of those that fit and of those that do not, and the first loser of each kind."""
    num_searched: int
    """Recipes that were compared."""
    num_fitting: int
    """Of these."""
    search_s: float = field(default=0.0, compare=False)
    """What comparing them by closed form took."""
    derived: Mapping[str, str] = field(default_factory=dict)
    """Settings that the planner chose, each with why."""
    quick: bool = False
    """By closed form alone: nothing was to be rehearsed."""

    @property
    def best(self) -> Prediction | None:
        """The first recipe, if it fits: by rehearsal, or in a quick plan by closed form."""
        first = self.recipes[0] if self.recipes else None
        return first if first and first.fits and (self.quick or first.method == "rehearsal") else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "device": {"name": self.device_name, "memory_bytes": self.budget_bytes},
            "goal": self.goal,
            "fits": self.best is not None,
            "searched": self.num_searched,
            "fitting": self.num_fitting,
            "recipes": [prediction.to_dict() for prediction in self.recipes],
            "derived": dict(self.derived),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a real run took."""

    peak: Peak
    ledger: Ledger
    """By owner at the peak, where the meter can tell (it cannot on every device: then all zero)."""
    step_time_s: float
    """Median over the steps after the first."""
    tokens_per_s: float
    meter: str
    """How memory was measured, in words."""
    ranks: tuple[Peak, ...] = ()
    """Each rank's peak where there are several: `peak` is the busiest one's."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "peak": self.peak.to_dict(),
            "ledger": self.ledger.to_dict(),
            "step_time_s": self.step_time_s,
            "tokens_per_s": self.tokens_per_s,
            "meter": self.meter,
            "ranks": [peak.to_dict() for peak in self.ranks],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """Predicted beside measured, after a run: `report.json`."""

    model: str
    recipe: Mapping[str, Any]
    steps: int
    first_loss: float
    last_loss: float
    predicted: Prediction
    measured: Measured
    environment: Mapping[str, str]
    """Versions that decide memory: brim, torch, transformers, peft, python, processor."""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    @property
    def relative_error(self) -> dict[str, float]:
        """(predicted - measured) / measured, for the allocated peak and for the step's time."""
        measured, predicted = self.measured, self.predicted
        return {
            "allocated_bytes": _relative(predicted.peak.allocated_bytes, measured.peak.allocated_bytes),
            "step_time_s": _relative(predicted.step_time_s, measured.step_time_s),
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "recipe": dict(self.recipe),
            "steps": self.steps,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "predicted": self.predicted.to_dict(),
            "measured": self.measured.to_dict(),
            "relative_error": self.relative_error,
            "evaluation": dict(self.evaluation),
            "environment": dict(self.environment),
            "reasons": list(self.reasons),
        }


def _relative(predicted: float, measured: float) -> float:
    return (predicted - measured) / measured if measured else 0.0
