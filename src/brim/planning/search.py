"""The best recipes that fit: all candidates by closed form, the leaders by rehearsal, every loser with its reason.

Pure: the exact predictor is passed in, nothing is read or run here. Deterministic: the same question gives the same
plan. A recipe is never put first on the closed form's word alone.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from brim.errors import UsageError
from brim.memory.bands import DEFAULT_RISK
from brim.models.spec import ModelSpec
from brim.planning.candidates import candidates_of, derived
from brim.planning.constraints import Constraints
from brim.planning.estimate import estimate, excess
from brim.planning.offers import Offer, costed, fewer
from brim.planning.pipeline import pipelined
from brim.planning.ranking import Candidate, Goal, caution, rank
from brim.planning.ways_out import NothingFitsError, refusal
from brim.recipe import Recipe
from brim.report import Plan, Prediction
from brim.units import Progress, format_bytes, format_count, no_progress

Rehearse = Callable[[Recipe, Offer], Prediction]
"""The exact predictor: a recipe's peak, nearly to the byte, in seconds."""

NUM_FINALISTS = 3
"""Rehearsed; more where none of them fits."""
MAX_REHEARSALS = 12
_LISTED = 25
"""Recipes that fit, and that do not, of which a plan holds whole predictions."""


def plan(
    spec: ModelSpec,
    offers: Sequence[Offer],
    *,
    rehearse: Rehearse | None,
    constraints: Constraints | None = None,
    goal: Goal = "fastest",
    risk: float = DEFAULT_RISK,
    progress: Progress = no_progress,
) -> Plan:
    """Recipes ranked for the goal; the first is rehearsed and fits its offer. `rehearse` None: by closed form alone.

    `offers`: each is used whole; for `cheapest` also less of it. `progress` counts finalists found. Raises
    NothingFitsError when no candidate fits; UsageError (RecipeError) when the constraints leave no candidate.
    """
    started_s = time.perf_counter()
    offers, unit = costed(offers)
    constraints = constraints or Constraints()
    found = _considered(spec, offers, constraints, goal, risk)
    ranked = rank(found, goal)
    search_s = time.perf_counter() - started_s
    trial = _Trial(spec=spec, risk=risk, rehearse=rehearse, progress=progress)
    if rehearse is not None:
        trial.run([candidate for candidate in ranked if candidate.may_fit], goal)
    lightest: Prediction | None = None
    if not trial.fitting and (rehearse is not None or not any(candidate.fits for candidate in ranked)):
        nearest = min(ranked, key=lambda c: (c.peak_bytes - c.kind.offer.budget_bytes, -c.tokens_per_s))
        lightest = trial.tried(nearest)
    recipes, num_fitting = trial.listed(ranked, goal, lightest)
    reasons = derived(spec, _on(constraints, offers[0]))
    if goal == "cheapest":
        reasons["goal"] = f"cheapest by {unit}" + ("" if unit == "price" else ": not every device's price is known")
    reasons |= _stages(spec, recipes[0], offers)
    result = Plan(
        model=spec.name,
        device_name=", ".join(dict.fromkeys(offer.name if len(offers) > 1 else offer.device.name for offer in offers)),
        budget_bytes=recipes[0].budget_bytes,
        goal=goal,
        recipes=recipes,
        num_searched=len(ranked),
        num_fitting=num_fitting,
        search_s=search_s,
        derived=reasons,
        quick=rehearse is None,
    )
    if lightest is not None and not lightest.fits:
        raise NothingFitsError(refusal(spec, nearest.kind.offer, constraints, lightest), result)
    return result


def _considered(
    spec: ModelSpec, offers: Sequence[Offer], constraints: Constraints, goal: Goal, risk: float
) -> list[Candidate]:
    """Of all offers. Less of an offer may not go with the constraints, where the whole of it does."""
    found: list[Candidate] = []
    for whole in offers:
        found += candidates_of(spec, whole, _on(constraints, whole), risk=risk, first_place=len(found))
        for part in fewer(whole)[1:] if goal == "cheapest" else ():
            rate = whole.cost_per_s * part.devices / whole.devices
            less = replace(part, cost_per_s=rate)
            try:
                found += candidates_of(spec, less, _on(constraints, less), risk=risk, first_place=len(found))
            except UsageError:
                continue
    return found


def _stages(spec: ModelSpec, best: Prediction, offers: Sequence[Offer]) -> dict[str, str]:
    """What pipeline stages would do in place of what the devices share."""
    recipe = Recipe.from_dict(best.recipe)
    device = next(offer.device for offer in offers if offer.device.name == best.device_name)
    found = pipelined(spec, recipe, device) if recipe.parallel.devices > 1 else None
    if found is None:
        return {}
    told = (
        f"1: this version builds no stages. {found.stages} of {found.blocks} blocks each would need "
        f"~{format_bytes(found.peak_bytes)} on a device and idle {found.idle:.0%} of the time with "
        f"{found.micro_batches} rows, one by one: {format_count(float(f'{found.tokens_per_s:.2g}'))} tokens/s"
    )
    return {"parallel.pipeline": told}


def _on(constraints: Constraints, offer: Offer) -> Constraints:
    return constraints.on(offer.device, devices_per_node=offer.devices_per_node, nodes=offer.nodes)


@dataclass(kw_only=True)
class _Trial:
    """Rehearsals so far, and what they showed."""

    spec: ModelSpec
    risk: float
    rehearse: Rehearse | None
    progress: Progress
    fitting: list[Candidate] = field(default_factory=list)
    """As they were rehearsed."""
    _exact: dict[int, Prediction] = field(default_factory=dict)
    """Place -> rehearsed."""

    def run(self, ranked: Sequence[Candidate], goal: Goal) -> None:
        """Rehearse in ranked order, what will fit if the closed form is right before the rest, until it is enough."""
        later: list[Candidate] = []
        probable = [candidate for candidate in ranked if candidate.probably_fits]
        rest = (candidate for candidate in ranked if not candidate.probably_fits)
        for candidate in ranked if goal == "lightest" else (*_in_variety(probable), *_in_variety(rest)):
            if self._is_done(candidate, goal):
                return
            if goal != "lightest" and self._same_kind_fits(candidate):
                later.append(candidate)
            else:
                self.tried(candidate)
        for candidate in later:
            if self._is_done(candidate, goal):
                return
            self.tried(candidate)

    def tried(self, candidate: Candidate) -> Prediction:
        """The exact prediction, asked for once; the closed form's where nothing rehearses."""
        if self.rehearse is None:
            return self._of(candidate)
        if candidate.place not in self._exact:
            exact = self.rehearse(candidate.recipe, candidate.kind.offer)
            self._exact[candidate.place] = exact
            if exact.fits:
                found = candidate._replace(peak_bytes=exact.peak.highest_bytes, tokens_per_s=exact.tokens_per_s)
                self.fitting.append(found)
            self.progress(min(len(self._exact), NUM_FINALISTS - (not self.fitting)), NUM_FINALISTS)
        return self._of(candidate)

    def listed(
        self, ranked: Sequence[Candidate], goal: Goal, lightest: Prediction | None
    ) -> tuple[tuple[Prediction, ...], int]:
        """Finalists, then what fits by closed form, then what does not, each in the goal's order; and how many fit."""
        finalists = rank(self.fitting, goal)
        places = {candidate.place for candidate in finalists}
        others = [candidate for candidate in ranked if candidate.place not in places]
        fitting = [c for c in others if c.fits and c.place not in self._exact]
        losing = [c for c in others if not c.fits or c.place in self._exact]
        shown = map(self._of, (*finalists, *fitting[:_LISTED], *self._telling(losing)))
        recipes = tuple(shown)
        if lightest is not None and not lightest.fits:
            recipes = (lightest, *(p for p in recipes if p.recipe != lightest.recipe))
        return recipes, len(finalists) + len(fitting)

    def _telling(self, losing: Sequence[Candidate]) -> Iterator[Candidate]:
        """The first, what was rehearsed, and the first of each kind."""
        groups = set()
        for index, candidate in enumerate(losing):
            group = candidate.kind.group
            if index < _LISTED or candidate.place in self._exact or group not in groups:
                yield candidate
            groups.add(group)

    def _of(self, candidate: Candidate) -> Prediction:
        """With why it does not fit, or what to know of it."""
        recipe, offer = candidate.recipe, candidate.kind.offer
        found = self._exact.get(candidate.place)
        if found is None:
            found = estimate(self.spec, recipe, device=offer.device, budget_bytes=offer.budget_bytes, risk=self.risk)
        reason = caution(recipe) if found.fits else excess(found)
        return found if reason is None else replace(found, reasons=(*found.reasons, reason))

    def _is_done(self, upcoming: Candidate, goal: Goal) -> bool:
        if len(self._exact) >= MAX_REHEARSALS:
            return True
        if goal != "lightest":
            return bool(self.fitting) and len(self._exact) >= NUM_FINALISTS
        # The lightest is proven only when no other can turn out lighter.
        lightest = min((c.peak_bytes for c in self.fitting), default=0)
        return len(self.fitting) >= NUM_FINALISTS and upcoming.lower_bytes > lightest

    def _same_kind_fits(self, candidate: Candidate) -> bool:
        """One finalist of each device, method and precision first, so that they are worth comparing."""
        return any(fitting.kind.group == candidate.kind.group for fitting in self.fitting)


def _in_variety(ranked: Iterable[Candidate]) -> Iterator[Candidate]:
    """Ranked order, but a kind that failed twice in rehearsal waits until every other kind had its turn."""
    turns: dict[tuple[object, ...], int] = {}
    waiting: list[Candidate] = []
    for candidate in ranked:
        group = candidate.kind.group
        turns[group] = turns.get(group, 0) + 1
        if turns[group] <= 2:
            yield candidate
        else:
            waiting.append(candidate)
    yield from waiting
