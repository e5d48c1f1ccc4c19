"""Laws of the planner, with the exact predictor passed in as a known multiple of the closed form."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.errors import DoesNotFitError, RecipeError, UsageError
from brim.hardware import Device
from brim.memory.anatomy import anatomy
from brim.models import ModelSpec, describe
from brim.planning import Constraints, NothingFitsError, Offer, plan
from brim.planning.candidates import candidates, candidates_of
from brim.planning.constraints import value_of
from brim.planning.estimate import estimate, excess
from brim.planning.ranking import rank
from brim.planning.search import MAX_REHEARSALS, NUM_FINALISTS
from brim.publish import write_whole
from brim.recipe import Precision, Recipe
from brim.report import Peak, Plan, Prediction
from brim.units import GIB, MIB, format_bytes

DEVICE = Device(
    name="cpu",
    kind="cpu",
    memory_bytes=64 * GIB,
    memory_free_bytes=64 * GIB,
    flops={"fp32": 5e10, "bf16": 1e11, "fp16": 1e11},
    bandwidth_bytes_per_s=1e10,
    cores=2,
)
_CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8,
    "num_attention_heads": 4, "vocab_size": 8000, "max_position_embeddings": 2048,
}  # fmt: skip
_UNCOUNTED = ModelSpec(name="small", kind="directory", config=_CONFIG, num_parameters=1, tied_head=True)
SPEC = replace(_UNCOUNTED, num_parameters=anatomy(_UNCOUNTED).num_parameters)
OFFER = Offer(device=DEVICE, budget_bytes=GIB)


class Rehearsal:
    """The closed form times a factor, as if it had been rehearsed; remembers what it was asked."""

    def __init__(self, budget_bytes: int, factor: Callable[[Recipe], float] = lambda recipe: 1.0) -> None:
        self.budget_bytes = budget_bytes
        self.factor = factor
        self.asked: list[Recipe] = []

    def __call__(self, recipe: Recipe, offer: Offer) -> Prediction:
        assert offer.device == DEVICE
        self.asked.append(recipe)
        return self.truth(recipe)

    def truth(self, recipe: Recipe) -> Prediction:
        quick = estimate(SPEC, recipe, device=DEVICE, budget_bytes=self.budget_bytes)
        peak = Peak(allocated_bytes=int(quick.peak.allocated_bytes * self.factor(recipe)))
        return replace(quick, peak=peak, method="rehearsal", error_band=(-0.001, 0.001))


def planned(rehearsal: Rehearsal, constraints: Constraints | None = None, goal: str = "fastest") -> Plan:
    return plan(
        SPEC,
        [Offer(device=DEVICE, budget_bytes=rehearsal.budget_bytes)],
        rehearse=rehearsal,
        constraints=constraints,
        goal="lightest" if goal == "lightest" else "fastest",
    )


def off_by(share: float) -> Callable[[Recipe], float]:
    """A factor within 1 +- share that differs from recipe to recipe."""
    return lambda recipe: 1 + share * (hash_of(recipe) % 201 - 100) / 100


def least(constraints: Constraints) -> int:
    """Bytes of the lightest candidate, by brute force."""
    found = candidates(SPEC, constraints)
    return min(estimate(SPEC, recipe, device=DEVICE, budget_bytes=GIB).peak.allocated_bytes for recipe in found)


def hash_of(recipe: Recipe) -> int:
    return sum(json.dumps(recipe.to_dict()).encode())


@given(st.integers(60, 4000), st.sampled_from(("fastest", "lightest")), st.sampled_from((0.0, 0.04, 0.09)))
@settings(max_examples=15, deadline=None)
def test_the_best_fits_and_is_rehearsed_or_nothing_is_given(megabytes: int, goal: str, share: float) -> None:
    """Whatever the budget and however the rehearsal differs, the plan's best fits by rehearsal, or an error says no."""
    rehearsal = Rehearsal(megabytes * MIB, off_by(share))
    try:
        result = planned(rehearsal, goal=goal)
    except NothingFitsError as error:
        assert not error.plan.recipes[0].fits
        return
    assert result.best is not None
    assert result.best.peak.allocated_bytes <= rehearsal.budget_bytes
    assert result.best == replace(rehearsal.truth(Recipe.from_dict(result.best.recipe)), reasons=result.best.reasons)
    assert len(rehearsal.asked) <= MAX_REHEARSALS + 1


def test_the_same_question_gives_the_same_plan() -> None:
    """Two runs agree in every recipe, rank and reason."""
    first, second = (planned(Rehearsal(GIB, off_by(0.05))) for _ in range(2))
    assert first.to_dict() == second.to_dict()


def test_no_candidate_is_lost_and_none_is_rehearsed_twice() -> None:
    """Every candidate is counted, what is listed is one of them, once, fitting ones first; each is rehearsed once."""
    rehearsal = Rehearsal(GIB, off_by(0.05))
    result = planned(rehearsal)
    known = {json.dumps(recipe.to_dict()) for recipe in candidates(SPEC, Constraints())}
    listed = [json.dumps(p.recipe) for p in result.recipes]
    assert result.num_searched == len(known)
    assert len(listed) == len(set(listed)) and set(listed) <= known
    fits = [p.fits for p in result.recipes]
    assert fits == sorted(fits, reverse=True)
    assert sum(fits) <= result.num_fitting < result.num_searched
    asked = [json.dumps(recipe.to_dict()) for recipe in rehearsal.asked]
    assert len(asked) == len(set(asked))


def test_each_method_and_precision_that_loses_somewhere_says_why() -> None:
    """However many recipes lose, the first loser of each kind is listed."""
    result = planned(Rehearsal(GIB))
    truths = (Rehearsal(GIB).truth(recipe) for recipe in candidates(SPEC, Constraints()))
    kinds = {
        (p.recipe["method"], *p.recipe["precision"].values()) for p in truths if p.peak.allocated_bytes > 1.11 * GIB
    }
    listed = {(p.recipe["method"], *p.recipe["precision"].values()) for p in result.recipes if not p.fits}
    assert kinds <= listed


def test_the_fastest_is_nearly_the_fastest_of_all_that_fit() -> None:
    """By brute force: no recipe that really fits is more than 5 % faster than the best."""
    rehearsal = Rehearsal(GIB)
    result = planned(rehearsal)
    truths = [rehearsal.truth(recipe) for recipe in candidates(SPEC, Constraints())]
    assert result.best is not None
    assert result.best.tokens_per_s >= 0.95 * max(p.tokens_per_s for p in truths if p.fits)


@pytest.mark.parametrize("share", [0.0, 0.02])
def test_the_lightest_is_the_lightest_of_all(share: float) -> None:
    """By brute force: no candidate takes less than the plan's lightest."""
    rehearsal = Rehearsal(GIB, off_by(share))
    result = planned(rehearsal, goal="lightest")
    assert result.best is not None
    truths = (rehearsal.truth(recipe) for recipe in candidates(SPEC, Constraints()))
    assert result.best.peak.allocated_bytes == min(p.peak.allocated_bytes for p in truths)


def test_a_finalist_that_fails_in_rehearsal_gives_way_to_the_next() -> None:
    """What the rehearsal says does not fit is listed with its exact excess, and another recipe is best."""
    first = planned(Rehearsal(GIB)).recipes[0]
    rehearsal = Rehearsal(GIB, lambda recipe: 100.0 if recipe.to_dict() == first.recipe else 1.0)
    result = planned(rehearsal)
    assert result.best is not None
    assert result.best.recipe != first.recipe
    (failed,) = (p for p in result.recipes if p.recipe == first.recipe)
    assert failed.method == "rehearsal"
    over = failed.peak.allocated_bytes - GIB
    assert f"{format_bytes(over)} over" in failed.reasons[0]


def test_finalists_differ_in_method_or_precision() -> None:
    """With memory to spare, the three finalists are three kinds of recipe, not one with three batch sizes."""
    result = planned(Rehearsal(32 * GIB))
    finalists = [p for p in result.recipes if p.method == "rehearsal"]
    kinds = {(p.recipe["method"], *p.recipe["precision"].values()) for p in finalists}
    assert len(finalists) == len(kinds) == NUM_FINALISTS


def test_progress_counts_finalists() -> None:
    """Progress never passes its total and reaches it when three finalists are found."""
    seen: list[tuple[int, int]] = []
    budget = 32 * GIB
    plan(
        SPEC,
        [Offer(device=DEVICE, budget_bytes=budget)],
        rehearse=Rehearsal(budget),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_losers_say_how_much_is_missing_and_where_it_went() -> None:
    """Each loser's reason names need, excess, and the largest ledger lines."""
    result = planned(Rehearsal(GIB))
    losers = [p for p in result.recipes if not p.fits]
    assert losers
    for loser in losers:
        largest = max(loser.ledger.to_dict().items(), key=lambda line: line[1])
        assert format_bytes(loser.peak.allocated_bytes) in loser.reasons[-1]
        assert f"{largest[0]} {format_bytes(largest[1])}" in loser.reasons[-1]
        over = loser.peak.allocated_bytes - GIB
        assert (f"{format_bytes(over)} over" if over > 0 else "may be over") in loser.reasons[-1]
        assert loser.reasons[-1] == excess(loser)


def test_nothing_fits_says_what_is_lightest_and_the_ways_out() -> None:
    """The error carries the lightest recipe of all, rehearsed, exit code 3, and ways out that hold."""
    constraints = Constraints(method="full", seq_len=2048, settings=("optimizer.name=adamw",))
    budget = least(constraints) - 1
    assert 1.1 * least(replace(constraints, method="lora")) < budget
    with pytest.raises(NothingFitsError) as caught:
        planned(Rehearsal(budget), constraints)
    error = caught.value
    assert isinstance(error, DoesNotFitError)
    assert error.exit_code == 3
    lightest, *rest = error.plan.recipes
    assert lightest.method == "rehearsal"
    assert error.plan.best is None
    assert lightest.peak.allocated_bytes == min(p.peak.allocated_bytes for p in error.plan.recipes)
    assert rest
    assert error.plan.num_searched == len(candidates(SPEC, constraints))
    assert error.plan.num_fitting == 0
    assert "more. Ways out: --memory" in str(error)
    assert "--method lora" in str(error)
    assert planned(Rehearsal(budget), replace(constraints, method="lora")).best is not None
    enough = int(str(error).split("--memory ")[1].split("MiB")[0]) * MIB
    assert planned(Rehearsal(enough), constraints).best is not None


def test_a_shorter_sequence_is_offered_when_it_helps() -> None:
    """The offered --seq-len fits the budget that the longer one did not."""
    lora = Constraints(method="lora")
    budget = (least(replace(lora, seq_len=2048)) + least(replace(lora, seq_len=256))) // 2
    with pytest.raises(NothingFitsError, match="--seq-len") as caught:
        planned(Rehearsal(budget), replace(lora, seq_len=2048))
    offered = int(str(caught.value).split("--seq-len ")[1].split(";")[0])
    assert 256 <= offered < 2048
    assert planned(Rehearsal(budget), replace(lora, seq_len=offered)).best is not None


def test_a_pinned_key_is_offered_another_value() -> None:
    """Where AdamW was asked for and only its states are too many, the optimizer that would do is named, and does."""
    asked = Constraints(method="full", seq_len=64, settings=("optimizer.name=adamw", "memory.loss=chunked"))
    other = replace(asked, settings=("optimizer.name=adamw8bit", "memory.loss=chunked"))
    budget = int(1.11 * least(other))
    assert budget < least(asked)
    with pytest.raises(NothingFitsError, match=r"optimizer\.name = adamw8bit for adamw"):
        planned(Rehearsal(budget), asked)
    assert planned(Rehearsal(budget), other).best is not None


@pytest.mark.parametrize("rows", [1, 6, 8, 48, 64])
def test_the_global_batch_is_kept(rows: int) -> None:
    """Micro-batch x accumulation is the global batch in every candidate, and all divisors up to 32 are there."""
    found = candidates(SPEC, Constraints(global_batch_size=rows))
    assert {r.micro_batch_size * r.grad_accumulation for r in found} == {rows}
    assert {r.micro_batch_size for r in found} == {n for n in range(1, min(rows, 128) + 1) if rows % n == 0}


@pytest.mark.parametrize(
    "pin",
    [
        "precision.weights=fp32",
        "precision.master=fp32",
        "precision.compute=fp32",
        "memory.loss=chunked",
        "memory.activation_checkpointing=full",
        "micro_batch_size=3",
        "grad_accumulation=5",
        "method=lora",
        "precision.weights=nf4",
        "precision.weights=int4",
        "lora.rank=4",
        "optimizer.learning_rate=0.001",
        "seq_len=77",
    ],
)
def test_a_pinned_key_holds_everywhere(pin: str) -> None:
    """Whatever is pinned with --set has that value in every candidate, and something else still varies."""
    found = candidates(SPEC, Constraints(settings=(pin,)))
    base = Recipe(model="small", precision=Precision(weights="fp32", compute="fp32"))
    key = pin.partition("=")[0]
    expected = base.with_settings(["method=qlora", pin] if pin.endswith(("nf4", "int4")) else [pin])
    for recipe in found:
        assert value_of(recipe, key) == value_of(expected, key)
    assert len(found) > 1


def test_candidates_are_distinct_and_warn_of_nothing() -> None:
    """No candidate appears twice or holds a setting without effect."""
    found = candidates(SPEC, Constraints())
    assert len(found) == len({json.dumps(recipe.to_dict()) for recipe in found})
    assert [warning for recipe in found for warning in recipe.warnings()] == []
    kinds = {(r.method, r.precision.weights, r.precision.compute, r.precision.master) for r in found}
    assert ("full", "fp32", "bf16", "none") in kinds
    assert ("lora", "fp32", "bf16", "none") not in kinds
    assert {"nf4", "int8", "int4"} == {weights for method, weights, *_ in kinds if method == "qlora"}
    assert not {"nf4", "int8", "int4"} & {weights for method, weights, *_ in kinds if method != "qlora"}


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (Constraints(settings=("precision.wieghts=fp32",)), "did you mean weights"),
        (Constraints(method="lora", settings=("precision.weights=int8",)), 'method = "qlora"'),
        (Constraints(method="full", settings=("method=lora",)), "both decide method"),
        (Constraints(seq_len=64, settings=("seq_len=32",)), "both decide seq_len"),
        (Constraints(global_batch_size=0), "the least is 1"),
        (Constraints(global_batch_size=8, settings=("micro_batch_size=3",)), "leave one of the three open"),
        (
            Constraints(settings=("precision.weights=bf16", "precision.compute=fp32")),
            "precision.compute",
        ),
    ],
)
def test_contradictions_and_misspelt_keys_are_named(constraints: Constraints, message: str) -> None:
    """A wrong or contradictory constraint is an error that names it, not an empty plan."""
    with pytest.raises((RecipeError, UsageError), match=message):
        planned(Rehearsal(GIB), constraints)


def test_among_equally_fast_recipes_fp32_copies_come_first() -> None:
    """Recipes within 5 % in speed are ordered by what they keep of small updates, of the gradient, of states, then by
    speed, then by weight."""
    found = candidates_of(SPEC, OFFER, Constraints(method="full", global_batch_size=1))
    level = [candidate._replace(tokens_per_s=100 + index % 7 / 1000) for index, candidate in enumerate(found)]
    ranked = rank(level, "fastest")
    losses = [
        (
            c.recipe.precision.weights == "bf16" and c.recipe.precision.master == "none",
            c.recipe.optimizer.in_backward,
            ("adamw", "adamw8bit", "adafactor", "lion").index(c.recipe.optimizer.name),
        )
        for c in ranked
    ]
    assert losses == sorted(losses) and len(set(losses)) > 8
    for _, group in itertools.groupby(zip(losses, ranked, strict=True), key=lambda pair: pair[0]):
        order = [(-candidate.tokens_per_s, candidate.peak_bytes) for _, candidate in group]
        assert order == sorted(order)


def test_pure_bf16_full_fine_tuning_carries_a_caution() -> None:
    """A recipe that trains all weights in BF16 without a copy says so, where they are rounded to nearest; AdamW's are
    rounded by chance unless nearest is pinned."""
    for pinned in ((), ("optimizer.rounding=nearest",)):
        result = planned(Rehearsal(64 * GIB), Constraints(method="full", global_batch_size=1, settings=pinned))
        for prediction in result.recipes:
            precision, optimizer = prediction.recipe["precision"], prediction.recipe["optimizer"]
            alone = precision["weights"] == "bf16" and precision["master"] == "none"
            by_chance = alone and optimizer["name"].startswith("adamw") and not pinned
            assert optimizer["rounding"] == ("stochastic" if by_chance else "nearest")
            pure = alone and not by_chance
            assert pure == any("without an FP32 copy" in reason for reason in prediction.reasons)


def test_a_saved_recipe_reads_back_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    """What --save writes is the recipe, in one file, also over an older one."""
    recipe = candidates(SPEC, Constraints())[7]
    for _ in range(2):
        write_whole(tmp_path / "r.toml", recipe.to_toml())
        assert Recipe.from_toml(tmp_path / "r.toml") == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


def test_a_gpus_host_takes_what_is_offloaded() -> None:
    """Beside a host, AdamW's states may be offloaded, and checkpointed recipes' all else: the device then needs less,
    the host what the device no longer has, and the step takes longer."""
    gpu = replace(DEVICE, kind="cuda")
    found = candidates(SPEC, Constraints(method="full", may_offload=True))
    pairs = [(r, replace(r, memory=replace(r.memory, offload="none"))) for r in found if r.memory.offload != "none"]
    assert {r.memory.offload for r, _ in pairs} == {"optimizer", "activations", "all"}
    assert all(r.memory.activation_checkpointing == "full" for r, _ in pairs if r.memory.offloads_activations)
    assert all(r.optimizer.name == "adamw" for r, _ in pairs if r.memory.offloads_optimizer)
    assert {plain for _, plain in pairs} <= set(found)
    for offloaded, plain in pairs[::7]:
        apart, here = (estimate(SPEC, r, device=gpu, budget_bytes=GIB) for r in (offloaded, plain))
        if offloaded.memory.offload == "optimizer":
            assert apart.ledger == replace(here.ledger, optimizer=0)
        if offloaded.memory.offloads_optimizer:
            assert apart.ledger.optimizer == 0
            assert apart.peak.host_bytes is not None and apart.peak.host_bytes >= here.ledger.optimizer
        if offloaded.memory.offloads_weights:
            assert apart.ledger.weights < here.ledger.weights
        assert apart.peak.allocated_bytes <= here.peak.allocated_bytes
        assert apart.peak.host_bytes
        assert apart.step_time_s > here.step_time_s
    assert all(r.memory.offload == "none" for r in candidates(SPEC, Constraints()))


def test_int4_is_planned_in_groups_that_go_into_a_row() -> None:
    """No INT4 recipe is considered whose groups do not divide the inputs of the model's linears (576 and 1536 here)."""
    found = candidates(describe("smollm2-135m"), Constraints(seq_len=128, global_batch_size=4))
    groups = {recipe.precision.group_size for recipe in found if recipe.precision.weights == "int4"}
    assert groups == {64}
    pinned = Constraints(seq_len=128, global_batch_size=4, settings=("precision.group_size=32",))
    found = candidates(describe("smollm2-135m"), pinned)
    assert {recipe.precision.group_size for recipe in found if recipe.precision.weights == "int4"} == {32}
