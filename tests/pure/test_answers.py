"""Kept answers against the predictions that they were made of."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim import answers
from brim.hardware import Device, find
from brim.models import ModelSpec, describe
from brim.recipe import Recipe
from brim.report import LEDGER_LINES, Inference, Ledger, Peak, Prediction
from brim.units import parse_bytes

GIB = 2**30
RECIPE = Recipe(model="smollm2-135m", seq_len=16)
SPEC = describe("smollm2-135m")
GPU = find("h100")
BYTES = st.integers(0, 2**50)
SECONDS = st.floats(1e-9, 1e9)


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(answers, "answers_directory", lambda: tmp_path / "answers")
    return tmp_path / "answers"


def prediction(**changed: Any) -> Prediction:
    facts: dict[str, Any] = {
        "model": SPEC.name, "recipe": RECIPE.to_dict(), "device_name": GPU.name, "budget_bytes": GIB,
        "peak": Peak(allocated_bytes=10, reserved_bytes=20, device_bytes=30), "ledger": Ledger(weights=10, context=20),
        "step_time_s": 0.1, "tokens_per_s": 160.0, "method": "rehearsal", "error_band": (-0.01, 0.02),
    }  # fmt: skip
    return Prediction(**(facts | changed))


def key(**changed: Any) -> str:
    facts: dict[str, Any] = {"spec": SPEC, "recipe": RECIPE, "device": GPU, "risk": 0.02} | changed
    return answers.question(facts["spec"], facts["recipe"], facts["device"], risk=facts["risk"])


@given(
    st.builds(Ledger, **dict.fromkeys(LEDGER_LINES, BYTES)), st.builds(Peak, allocated_bytes=BYTES, device_bytes=BYTES),
    SECONDS, st.lists(st.text(), max_size=3), st.none() | st.just((0.5, 2.0)),
    st.none() | st.builds(Inference, **dict.fromkeys(Inference.__dataclass_fields__, BYTES)),
)  # fmt: skip
def test_a_prediction_survives_its_dictionary(
    ledger: Ledger,
    peak: Peak,
    seconds: float,
    reasons: list[str],
    spread: tuple[float, float] | None,
    inference: Inference | None,
) -> None:
    """Written as JSON and read again, a prediction is the same, every digit of it."""
    made = prediction(
        ledger=ledger, peak=peak, step_time_s=seconds, reasons=tuple(reasons), step_time_range_s=spread,
        inference=inference, recipe={"model": "m"},
    )  # fmt: skip
    assert Prediction.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_the_same_question_has_the_same_answer() -> None:
    """What is kept is recalled; with the memory that is free now, and the budget that is asked for."""
    assert answers.recall(key(), RECIPE, GPU, budget_bytes=GIB) is None
    answers.keep(key(), prediction())
    assert answers.recall(key(), RECIPE, GPU, budget_bytes=GIB) == prediction()
    busy = replace(GPU, memory_free_bytes=1)
    assert answers.recall(key(device=busy), RECIPE, busy, budget_bytes=20) == prediction(budget_bytes=20)
    found = answers.recall(key(), RECIPE, GPU, budget_bytes=20)
    assert found is not None and not found.fits


def another_model() -> ModelSpec:
    return replace(SPEC, config={**SPEC.config, "num_hidden_layers": 31})


def smaller_gpu() -> Device:
    return GPU.capped(parse_bytes("20GiB"))


@pytest.mark.parametrize(
    "changed",
    [
        {"spec": another_model()}, {"spec": replace(SPEC, tied_head=False)},
        {"recipe": RECIPE.with_settings(["seq_len=17"])},
        {"device": find("a100")}, {"device": smaller_gpu()}, {"device": replace(GPU, bandwidth_bytes_per_s=1.0)},
        {"risk": 0.1},
    ],
    ids=["config", "head", "recipe", "device", "memory", "rates", "risk"],
)  # fmt: skip
def test_another_question_has_another_name(changed: dict[str, Any]) -> None:
    """Whatever decides a prediction is in its question."""
    assert key(**changed) != key()


def test_other_versions_and_other_sources_are_other_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new torch, or a changed file of Brim, and nothing that was kept is an answer."""
    names = [key()]
    for change in (("version", lambda library: "99"), ("_source", lambda: iter([("rehearsal.py", 1, 1)]))):
        with monkeypatch.context() as patched:
            answers._code.cache_clear()
            patched.setattr(answers, *change)
            names.append(key())
    answers._code.cache_clear()
    assert len(set(names)) == 3


@given(st.data())
def test_a_damaged_answer_is_none(data: st.DataObject) -> None:
    """Cut anywhere, or with any byte changed, a file is never taken for an answer."""
    answers.keep(key(), prediction())
    path = answers.answers_directory() / key()
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    other = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
    path.write_bytes(whole[:place] if cut else whole[:place] + bytes([other]) + whole[place + 1 :])
    assert answers.recall(key(), RECIPE, GPU, budget_bytes=GIB) is None


def test_the_oldest_answers_go(monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    """Never more than the limit, and an answer that was asked for again outlives one that was not."""
    monkeypatch.setattr(answers, "LIMIT", 3)
    for name in "abc":
        answers.keep(name, prediction())
    answers.recall("a", RECIPE, GPU, budget_bytes=GIB)
    for name in "de":
        answers.keep(name, prediction())
    assert {path.name for path in empty.iterdir()} == {"a", "d", "e"}


def test_a_disk_that_refuses_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where nothing can be written, nothing is kept and nothing is said."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(answers, "answers_directory", lambda: tmp_path / "file" / "answers")
    answers.keep(key(), prediction())
    assert answers.recall(key(), RECIPE, GPU, budget_bytes=GIB) is None
