"""Published rows as recipes: every row is expressed or named as missing something, and sums are sums."""

from collections import Counter
from itertools import pairwise

import pytest
from benchmarks.published import DATA, Missing, Row, case_of, measured_bytes, read
from benchmarks.summary import macro_average, summarize
from hypothesis import given
from hypothesis import strategies as st

from brim.errors import UsageError
from brim.memory.bands import Excess, band, gpu_band, kind_of_run
from brim.recipe import Recipe
from brim.units import GIB

ROWS = read(DATA / "published_peaks.csv")
RECIPE = Recipe(model="smollm2-135m")


def test_no_row_is_dropped_in_silence() -> None:
    """Each row becomes a recipe with its own batch and length, or raises what is missing; most say the same few."""
    missing: Counter[str] = Counter()
    expressed = 0
    for row in ROWS:
        try:
            case = case_of(row)
        except Missing as lack:
            assert str(lack)
            missing[str(lack)] += 1
            continue
        expressed += 1
        recipe = case.recipe
        if case.writing is not None:
            assert str(case.writing.context) == row["seq_len"].split(" in")[0]
            assert case.writing.batch_size == int(row["micro_batch_size"])
            continue
        assert recipe.micro_batch_size == int(row["micro_batch_size"])
        assert recipe.seq_len == int(row["seq_len"])
        assert recipe.method == row["method"].split(" (")[0]
    assert expressed + sum(missing.values()) == len(ROWS)
    assert expressed >= 100


@pytest.mark.parametrize(
    ("value", "unit", "notes", "nbytes"),
    [
        ("72434837504", "bytes", "", 72434837504),
        ("1", "GB", "", 10**9),
        ("1", "GB", "reserved, GiB printed as GB", GIB),
        ("1.5", "GiB", "", 3 * GIB // 2),
        ("2", "MB", "(value in MB, likely MiB)", 2**21),
    ],
)
def test_units_are_read_as_they_were_meant(value: str, unit: str, notes: str, nbytes: int) -> None:
    """GB is 10^9 and GiB 2^30, unless the row's notes say that the program confused them."""
    row: Row = {"peak_memory_value": value, "unit": unit, "notes": notes}
    assert measured_bytes(row) == nbytes


def test_a_padding_token_is_one_row_more() -> None:
    """fms-hf-tuning adds it to models without one alone: Mistral has 32,001 rows there, PowerLM those of its file."""
    rows = {row["id"]: row for row in ROWS}
    words = {name: case_of(rows[name]).spec.config["vocab_size"] for name in ("fms-034", "fms-188", "fsdpqlora-025")}
    assert words == {"fms-034": 32001, "fms-188": 49152, "fsdpqlora-025": 32000}


@given(errors=st.lists(st.floats(-0.9, 3), min_size=1, max_size=60))
def test_a_summary_is_between_its_extremes(errors: list[float]) -> None:
    """median <= 90th percentile <= largest absolute error; one source's macro average is that source."""
    part = summarize(errors)
    assert part.median <= part.p90 <= max(abs(error) for error in errors)
    assert min(errors) <= part.bias <= max(errors)
    assert part.under == sum(error < 0 for error in errors) / len(errors)
    assert macro_average([part]) == part


@pytest.mark.parametrize("settings", [["method=full"], ["method=qlora", "precision.weights=nf4"]])
def test_a_band_holds_the_errors_it_was_learned_from(settings: list[str]) -> None:
    """At risk 0 no learned error is above the band, at risk 0.1 at most a tenth; a greater risk never widens it."""
    recipe = RECIPE.with_settings(settings)
    text = (DATA.parents[1] / "src/brim/memory/data/gpu_errors.csv").read_text(encoding="utf-8")
    errors = [float(line.rsplit(",", 1)[1]) for line in text.splitlines() if f'"{kind_of_run(recipe)}"' in line]
    bands = [gpu_band(recipe, risk=risk) for risk in (0.0, 0.02, 0.1)]
    assert errors and all(error <= bands[0][1] for error in errors)
    assert sum(error > bands[2][1] for error in errors) <= 0.1 * len(errors)
    assert all(wide[0] <= narrow[0] <= 0 <= narrow[1] <= wide[1] for wide, narrow in pairwise(bands))


def told(kind: str, source: str, *errors: float, counter: str = "reserved") -> list[Excess]:
    return [Excess(kind_of_run=kind, counter=counter, source=source, excess=error) for error in errors]


def test_a_kind_that_one_source_told_has_the_band_of_a_wider_kind() -> None:
    """Five rows of two sources decide; else all kinds that begin with what is left of the kind's name."""
    own = told("full, transformers, sharded", "a", 0.1, 0.1, 0.1, 0.1, 0.1)
    wide = told("full, transformers", "b", 0.5, 0.6) + told("lora, transformers", "b", 9.0)
    assert band([*own, *wide], "full, transformers, sharded", risk=0) == (0, 0.6)
    second = told("full, transformers, sharded", "b", -0.2)
    assert band([*own, *wide, *second], "full, transformers, sharded", risk=0) == (-0.2, 0.1)
    assert band([*own, *wide], "packed, litgpt", risk=0) == (0, 9.0)


def test_what_lives_does_not_tell_what_a_card_holds() -> None:
    """A kind whose second source read live bytes alone is told by one alone; where nobody read more, they must do."""
    held = told("lora, transformers", "a", *[0.2] * 5)
    live = told("lora, transformers", "b", *[0.0] * 5, counter="allocated")
    others = told("full, transformers", "b", 0.3)
    assert band([*held, *live, *others], "lora, transformers", risk=0) == (0, 0.3)
    assert band([*live, *told("lora, transformers", "c", 0.01, counter="active")], "lora, transformers", risk=0) == (
        0,
        0.01,
    )


@given(
    worst=st.lists(st.floats(-0.5, 1), min_size=5, max_size=30),
    others=st.lists(st.floats(-0.5, 1), min_size=5, max_size=90),
    risk=st.sampled_from([0.0, 0.02, 0.1, 0.3]),
)
def test_a_source_with_many_rows_outvotes_no_other(worst: list[float], others: list[float], risk: float) -> None:
    """Of each source, however many rows the other has, at most the risk's share lies above the bound."""
    _, high = band([*told("full", "a", *worst), *told("full", "b", *others)], "full", risk=risk)
    for errors in (worst, others):
        assert sum(error > high for error in errors) <= risk * len(errors)


def test_a_risk_is_a_share() -> None:
    with pytest.raises(UsageError, match="--risk 2"):
        gpu_band(RECIPE, risk=2)
