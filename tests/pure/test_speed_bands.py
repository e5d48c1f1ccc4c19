"""Rates between sizes, and ranges of step times: shipped errors first, the user's own runs after three of them."""

from pathlib import Path

import pytest

from brim.hardware.operator_rates import KEYS, LENGTHS, SIZES, OperatorRates, key, product_shape
from brim.speed import bands
from brim.speed.bands import OPERATORS, keep_run, own_errors, time_range


def rates(**changed: float) -> OperatorRates:
    return OperatorRates(rates=dict.fromkeys(KEYS, 1e9) | changed, overhead_s=1e-6)


def test_a_rate_lies_between_those_of_its_neighbours() -> None:
    """At a size that was timed the rate is the timed one; between two it lies between; beyond the last it stays."""
    timed = dict(zip(SIZES, (8e9, 4e9, 1e9), strict=True))
    found = rates(**{key("fresh", "fp32", size): rate for size, rate in timed.items()})

    def rate(size: int) -> float:
        return 1e9 / found.pass_s(1e9, largest=size, kind="fresh", number_format="fp32")

    assert [rate(size) for size in SIZES] == pytest.approx(list(timed.values()))
    assert 1e9 < rate(2**24) < 4e9
    assert rate(1) == pytest.approx(8e9) and rate(2**40) == pytest.approx(1e9)
    sizes = [2**power for power in range(10, 30)]
    assert [rate(size) for size in sizes] == sorted((rate(size) for size in sizes), reverse=True)


def test_attention_of_long_rows_takes_the_rate_of_long_rows() -> None:
    found = rates(**{key("attention", "bf16", LENGTHS[-1]): 4e9})
    at = [found.attention_s(1e9, tokens=n, direction="attention", number_format="bf16") for n in (64, 1024, 8192)]
    assert at == pytest.approx([1, 0.25, 0.25])


def test_rates_survive_their_file_and_damaged_ones_do_not() -> None:
    """What was written is read again; a missing, negative or odd rate makes the whole of it unknown."""
    found = rates()
    assert OperatorRates.from_dict(found.to_dict()) == found
    for damage in (None, -1.0, 0, "fast", True, float("inf")):
        broken = found.to_dict()
        broken["rates"] = {**broken["rates"], KEYS[0]: damage}
        assert OperatorRates.from_dict(broken) is None
    damaged: list[object] = [None, {}, {"rates": []}, {"rates": found.rates, "overhead_s": None}]
    assert [OperatorRates.from_dict(values) for values in damaged] == [None] * 4


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((512, 768, 2048), "square"),
        ((512, 768, 50257), "wide"),
        ((64, 768, 2048), "few"),
        ((512, 16, 768), "thin"),
        ((512, 768, 16), "narrow"),
        ((16, 512, 768), "narrow"),
    ],
)
def test_products_are_sorted_by_their_shortest_side(shape: tuple[int, int, int], kind: str) -> None:
    assert product_shape(*shape) == kind


def test_own_runs_replace_the_shipped_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs leave the shipped range; the third narrows it to where the user's own runs lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shipped = time_range(10.0, basis=OPERATORS, identity="mine")
    assert shipped is not None and shipped[0] < shipped[1]
    for number, measured in enumerate((12.0, 12.2, 12.4)):
        assert (time_range(10.0, basis=OPERATORS, identity="mine") == shipped) is (number < 3)
        keep_run(basis=OPERATORS, identity="mine", predicted_s=10, measured_s=measured)
    own = time_range(10.0, basis=OPERATORS, identity="mine")
    assert own is not None and 12.0 <= own[0] <= own[1] <= 12.4
    assert time_range(10.0, basis=OPERATORS, identity="another") == shipped


def test_damaged_runs_are_passed_over(tmp_path: Path) -> None:
    """Lines that are no runs, or runs that took no time, are not errors; the good ones count."""
    path = tmp_path / "runs.jsonl"
    keep_run(basis=OPERATORS, identity="mine", predicted_s=2, measured_s=3, path=path)
    with path.open("a") as file:
        file.write('rubbish\n[]\n{"basis": "cpu-operators", "identity": "mine", "error": -2}\n{}\n')
    keep_run(basis=OPERATORS, identity="mine", predicted_s=0, measured_s=3, path=path)
    assert own_errors(OPERATORS, "mine", path=path) == [0.5]
    assert own_errors(OPERATORS, "mine", path=tmp_path / "absent") == []


def test_no_errors_no_range() -> None:
    """A basis that nobody measured has no range, rather than a guess."""
    assert time_range(1.0, basis="unheard-of", identity="") is None
    assert all(len(errors) >= 10 for errors in bands.shipped_errors().values())
