"""Plain results: the ledger's sum cannot drift, and the JSON has the contract's keys."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.recipe import Recipe
from brim.report import LEDGER_LINES, Ledger, Measured, Peak, Plan, Prediction, RunReport

LINES = [
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "loss",
    "gathered",
    "workspace",
    "context",
    "fragmentation",
]
LEDGERS = st.builds(Ledger, **{line: st.integers(0, 2**50) for line in LINES})


def prediction(*, peak: int = 100, budget: int = 100, **changes: Any) -> Prediction:
    values: dict[str, Any] = {
        "model": "smollm2-135m", "recipe": Recipe(model="smollm2-135m").to_dict(), "device_name": "cpu",
        "budget_bytes": budget, "peak": Peak(allocated_bytes=peak), "ledger": Ledger(weights=peak), "step_time_s": 2.0,
        "tokens_per_s": 512.0, "method": "rehearsal", "error_band": (0.0, 0.0),
    }  # fmt: skip
    return Prediction(**(values | changes))


@given(LEDGERS)
def test_total_is_the_sum_of_the_lines(ledger: Ledger) -> None:
    """Every byte is on one line, and the total is what the lines hold."""
    assert ledger.total == sum(ledger.to_dict().values())


@given(LEDGERS, st.sampled_from(LINES), st.integers(1, 2**40))
def test_total_follows_each_line(ledger: Ledger, line: str, added: int) -> None:
    """A byte more on any line is a byte more in the total."""
    more = dataclasses.replace(ledger, **{line: getattr(ledger, line) + added})
    assert more.total == ledger.total + added


def test_ledger_lines_are_the_contract() -> None:
    """The lines, in the contract's order."""
    assert list(LEDGER_LINES) == list(Ledger().to_dict()) == LINES


def test_prediction_json_is_the_contract() -> None:
    """`predict --json` has exactly the contract's keys, in its order, and is JSON."""
    value = json.loads(json.dumps(prediction().to_dict()))
    assert list(value) == [
        "schema", "model", "recipe", "device", "peak", "ledger", "fits", "step_time_s", "step_time_range_s",
        "step_time_basis", "tokens_per_s", "method", "error_band", "reasons",
    ]  # fmt: skip
    assert value["schema"] == 1
    assert value["device"] == {"name": "cpu", "memory_bytes": 100}
    assert value["peak"] == {"allocated_bytes": 100, "reserved_bytes": None, "device_bytes": None}
    assert value["error_band"] == [0.0, 0.0]
    assert Recipe.from_dict(value["recipe"]) == Recipe(model="smollm2-135m")


@given(st.integers(0, 2**50), st.integers(1, 2**50))
def test_fits_at_the_brim(peak: int, budget: int) -> None:
    """Without an error band a peak fits exactly when it is not more than the budget."""
    assert prediction(peak=peak, budget=budget).fits == (peak <= budget)


def test_fits_counts_the_error_band() -> None:
    """A peak within the budget whose upper bound is over it does not fit."""
    assert prediction(peak=1000, budget=1001, error_band=(-0.001, 0.001)).fits
    assert not prediction(peak=1000, budget=1000, error_band=(-0.001, 0.001)).fits


def test_plan_is_as_good_as_its_first_recipe() -> None:
    """A plan's best is its first recipe if that fits by rehearsal; no recipes, no best."""

    def plan(*recipes: Prediction) -> Plan:
        return Plan(
            model="m", device_name="cpu", budget_bytes=100, goal="fastest", recipes=recipes,
            num_searched=len(recipes), num_fitting=sum(p.fits for p in recipes),
        )  # fmt: skip

    fitting, too_large = prediction(), prediction(peak=101)
    assert plan(fitting, too_large).best is fitting
    assert plan(too_large, fitting).best is None
    assert plan(prediction(method="closed-form")).best is None
    assert plan().best is None
    value = plan(fitting, too_large).to_dict()
    assert [entry["fits"] for entry in value["recipes"]] == [True, False]
    assert (value["schema"], value["fits"]) == (1, True)


@pytest.mark.parametrize(("predicted", "measured", "error"), [(110, 100, 0.1), (90, 100, -0.1), (5, 0, 0.0)])
def test_relative_error_is_against_the_measured(predicted: int, measured: int, error: float) -> None:
    """Too high a prediction is a positive error, relative to what was measured."""
    report = RunReport(
        model="m",
        recipe={},
        steps=3,
        first_loss=2.0,
        last_loss=1.0,
        predicted=prediction(peak=predicted, step_time_s=3.0),
        measured=Measured(
            peak=Peak(allocated_bytes=measured), ledger=Ledger(), step_time_s=2.0, tokens_per_s=1.0, meter="profiler"
        ),
        environment={"torch": "2.13.0"},
    )
    assert report.relative_error == {"allocated_bytes": pytest.approx(error), "step_time_s": pytest.approx(0.5)}
    value = json.loads(json.dumps(report.to_dict()))
    assert {"schema", "predicted", "measured", "relative_error"} <= set(value)
    assert value["schema"] == 1


def test_results_cannot_be_changed() -> None:
    """A result is a fact: assigning to it fails."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Ledger().weights = 1  # type: ignore[misc]
