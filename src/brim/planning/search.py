"""The best recipes that fit: all candidates by closed form, the leaders by rehearsal, every loser with its reason.

Pure: the exact predictor is passed in, nothing is read or run here. Deterministic: the same question gives the same
plan. A recipe is never put first on the closed form's word alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from brim.errors import DoesNotFitError
from brim.hardware.device import Device
from brim.memory.bands import DEFAULT_RISK
from brim.models.spec import ModelSpec
from brim.planning.candidates import Constraints, candidates, derived
from brim.planning.estimate import estimate, excess, lower_bound, published_band, upper_bound
from brim.planning.ranking import Goal, caution, kind_of, rank
from brim.recipe import Recipe
from brim.report import Plan, Prediction
from brim.units import Progress, format_bytes, no_progress

Rehearse = Callable[[Recipe], Prediction]
"""The exact predictor: a recipe's peak, nearly to the byte, in seconds."""

NUM_FINALISTS = 3
MAX_REHEARSALS = 12

_SHORTEST_SEQ_LEN = 16
_MOST_GPUS = 8
"""In one machine."""


class NothingFitsError(DoesNotFitError):
    """No candidate fits. `plan.recipes[0]` is the lightest there is, rehearsed."""

    def __init__(self, message: str, plan: Plan) -> None:
        super().__init__(message)
        self.plan = plan


def plan(
    spec: ModelSpec,
    device: Device,
    *,
    budget_bytes: int,
    rehearse: Rehearse | None,
    constraints: Constraints | None = None,
    goal: Goal = "fastest",
    risk: float = DEFAULT_RISK,
    progress: Progress = no_progress,
) -> Plan:
    """Recipes ranked for the goal; the first is rehearsed and fits the budget. `rehearse` None: by closed form alone.

    `progress` counts finalists found. Raises NothingFitsError when no candidate fits; UsageError (RecipeError) when
    the constraints leave no candidate.
    """
    constraints = replace(constraints or Constraints(), may_offload=device.kind == "cuda")
    quick = {
        repr(recipe): (recipe, estimate(spec, recipe, device=device, budget_bytes=budget_bytes, risk=risk))
        for recipe in candidates(spec, constraints)
    }
    recipe_of = {id(prediction): recipe for recipe, prediction in quick.values()}
    ranked = rank((prediction for _, prediction in quick.values()), goal)
    exact = rehearse or (lambda recipe: quick[repr(recipe)][1])
    trial = _Trial(rehearse=lambda prediction: exact(recipe_of[id(prediction)]), progress=progress)
    if rehearse is not None:
        bands = (published_band(spec, recipe_of[id(p)], device, risk) for p in ranked)
        trial.run([p for p, band in zip(ranked, bands, strict=True) if _may_fit(p, band)], goal)
    if not trial.fitting and (rehearse is not None or not any(p.fits for p in ranked)):
        lightest = trial.rehearsed(rank(ranked, "lightest")[0])
        if lightest.fits:
            trial.fitting.append(lightest)
        else:
            raise _nothing_fits(spec, device, constraints, goal, lightest, trial.all_of(ranked, goal))
    return Plan(
        model=spec.name,
        device_name=device.name,
        budget_bytes=budget_bytes,
        goal=goal,
        recipes=trial.all_of(ranked, goal),
        derived=derived(spec, constraints),
        quick=rehearse is None,
    )


def _may_fit(quick: Prediction, band: tuple[float, float]) -> bool:
    """Whether a rehearsal's upper bound can be within the budget: this band about the lowest peak it may show."""
    low, high = band
    return lower_bound(quick) / (1 + low) * (1 + high) <= quick.budget_bytes


@dataclass(kw_only=True)
class _Trial:
    """Rehearsals so far, and what they showed."""

    rehearse: Callable[[Prediction], Prediction]
    progress: Progress
    fitting: list[Prediction] = field(default_factory=list)
    _exact: dict[int, Prediction] = field(default_factory=dict)
    """Closed-form prediction's id -> rehearsed."""

    def run(self, ranked: Sequence[Prediction], goal: Goal) -> None:
        """Rehearse in ranked order until enough fit or the limit is reached."""
        later: list[Prediction] = []
        for prediction in _in_variety(ranked) if goal == "fastest" else ranked:
            if self._is_done(prediction, goal):
                return
            if goal == "fastest" and self._same_kind_fits(prediction):
                later.append(prediction)
            else:
                self._try(prediction)
        for prediction in later:
            if self._is_done(prediction, goal):
                return
            self._try(prediction)

    def _try(self, prediction: Prediction) -> None:
        exact = self.rehearsed(prediction)
        if exact.fits:
            self.fitting.append(exact)
            self.progress(min(len(self.fitting), NUM_FINALISTS), NUM_FINALISTS)

    def rehearsed(self, prediction: Prediction) -> Prediction:
        """The exact prediction, asked for once."""
        if id(prediction) not in self._exact:
            exact = self.rehearse(prediction)
            self._exact[id(prediction)] = _explained(exact)
        return self._exact[id(prediction)]

    def all_of(self, ranked: Sequence[Prediction], goal: Goal) -> tuple[Prediction, ...]:
        """Finalists, then what fits by closed form, then what does not; each in the goal's order."""
        finalists = rank(self.fitting, goal)
        others = [self._exact.get(id(p), p) for p in ranked]
        others = [_explained(p) for p in others if all(p is not finalist for finalist in finalists)]
        return (*finalists, *(p for p in others if p.fits), *(p for p in others if not p.fits))

    def _is_done(self, upcoming: Prediction, goal: Goal) -> bool:
        if len(self._exact) >= MAX_REHEARSALS:
            return True
        if len(self.fitting) < NUM_FINALISTS:
            return False
        # The lightest is proven only when no other can turn out lighter.
        lightest = min(p.peak.highest_bytes for p in self.fitting)
        return goal == "fastest" or lower_bound(upcoming) > lightest

    def _same_kind_fits(self, prediction: Prediction) -> bool:
        """One finalist of each method and precision first, so that they are worth comparing."""
        return any(kind_of(p) == kind_of(prediction) for p in self.fitting)


def _in_variety(ranked: Sequence[Prediction]) -> Iterator[Prediction]:
    """Ranked order, but a kind that failed twice in rehearsal waits until every other kind had its turn."""
    turns: dict[tuple[object, ...], int] = {}
    waiting: list[Prediction] = []
    for prediction in ranked:
        kind = kind_of(prediction)
        turns[kind] = turns.get(kind, 0) + 1
        if turns[kind] <= 2:
            yield prediction
        else:
            waiting.append(prediction)
    yield from waiting


def _explained(prediction: Prediction) -> Prediction:
    """With why it does not fit, or what to know of it."""
    reason = caution(prediction) if prediction.fits else excess(prediction)
    if reason is None or reason in prediction.reasons:
        return prediction
    return replace(prediction, reasons=(*prediction.reasons, reason))


def _nothing_fits(
    spec: ModelSpec,
    device: Device,
    constraints: Constraints,
    goal: Goal,
    lightest: Prediction,
    ranked: Sequence[Prediction],
) -> NothingFitsError:
    rest = (p for p in ranked if p is not lightest and p.recipe != lightest.recipe)
    failed = Plan(
        model=spec.name,
        device_name=device.name,
        budget_bytes=lightest.budget_bytes,
        goal=goal,
        recipes=(lightest, *rest),
        derived=derived(spec, constraints),
    )
    missing = upper_bound(lightest) - lightest.budget_bytes
    ways = "; ".join(ways_out(spec, device, constraints, lightest))
    return NothingFitsError(
        f"{spec.name}: nothing fits {format_bytes(lightest.budget_bytes)} on {device.name}; the lightest recipe "
        f"({summary(lightest)}) needs {format_bytes(upper_bound(lightest))}, {format_bytes(missing)} more. "
        f"Ways out: {ways}",
        failed,
    )


def ways_out(spec: ModelSpec, device: Device, constraints: Constraints, lightest: Prediction) -> list[str]:
    """What would make the lightest recipe fit, each with its number."""
    budget = lightest.budget_bytes
    ways = [f"--memory {-(-upper_bound(lightest) // 2**20)}MiB, if the machine has it"]
    lighter: dict[str, tuple[Literal["lora", "qlora"], ...]] = {"full": ("lora", "qlora"), "lora": ("qlora",)}
    for method in lighter.get(constraints.method, ()):
        if "method" in constraints.pinned or "precision.weights" in constraints.pinned:
            break
        others = _estimates(spec, device, replace(constraints, method=method), budget)
        needed = min(p.peak.highest_bytes for p in others)
        if any(p.fits for p in others):
            ways.append(f"--method {method} (from about {format_bytes(needed)} on)")
            break
    ways += _more_devices(spec, device, constraints, budget)
    length = int(lightest.recipe["seq_len"]) // 2
    while "seq_len" not in constraints.pinned and length >= _SHORTEST_SEQ_LEN:
        if any(p.fits for p in _estimates(spec, device, replace(constraints, seq_len=length), budget)):
            ways.append(f"--seq-len {length}")
            break
        length //= 2
    if len(ways) == 1:
        ways.append("a smaller model")
    return ways


def _more_devices(spec: ModelSpec, device: Device, constraints: Constraints, budget_bytes: int) -> list[str]:
    """The fewest GPUs, twice as many at a time, among which the job can be divided."""
    count, rows = constraints.devices_per_node, constraints.global_batch_size
    if device.kind == "cpu" or any(key.startswith("parallel.") for key in constraints.pinned):
        return []
    while (count := 2 * count) <= _MOST_GPUS and (rows is None or rows % (count * constraints.nodes) == 0):
        others = _estimates(spec, device, replace(constraints, devices_per_node=count), budget_bytes)
        if any(p.fits for p in others):
            needed = min(p.peak.highest_bytes for p in others)
            return [f"--gpus {count} (about {format_bytes(needed)} on each)"]
    return []


def summary(prediction: Prediction) -> str:
    """`lora, bf16, 4 x 1024 tokens, checkpointing full, loss chunked`."""
    recipe = prediction.recipe
    memory = recipe["memory"]
    states = ", 8-bit states" if recipe["optimizer"]["name"] == "adamw8bit" else ""
    return (
        f"{recipe['method']}, {recipe['precision']['weights']}{states}{_offloaded(recipe)}, "
        f"{recipe['micro_batch_size']} x {recipe['seq_len']} tokens, "
        f"checkpointing {memory['activation_checkpointing']}, loss {memory['loss']}"
    )


def _offloaded(recipe: Mapping[str, Any]) -> str:
    words = {"none": "", "all": ", weights and activations on the host"}
    kind = recipe["memory"]["offload"]
    return words.get(kind, f", {kind} on the host")


def _estimates(spec: ModelSpec, device: Device, constraints: Constraints, budget_bytes: int) -> list[Prediction]:
    return [
        estimate(spec, recipe, device=device, budget_bytes=budget_bytes) for recipe in candidates(spec, constraints)
    ]
