"""Bytes, counts and durations: what is written can be read back, and larger never reads smaller."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim import units
from brim.errors import BrimError, UsageError, did_you_mean, nearest

BYTES = st.integers(1, 2**50)
SECONDS_PER_UNIT = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
COUNT_PER_UNIT = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def read_duration(text: str) -> float:
    """Seconds in `2 h 05 min`."""
    words = text.split()
    return sum(float(number) * SECONDS_PER_UNIT[unit] for number, unit in zip(words[::2], words[1::2], strict=True))


def read_count(text: str) -> float:
    """What `134M` stands for."""
    return float(text[:-1]) * COUNT_PER_UNIT[text[-1]] if text[-1] in COUNT_PER_UNIT else float(text)


@given(BYTES)
def test_bytes_round_trip(nbytes: int) -> None:
    """parse(format(n)) is n within half of the third digit."""
    assert units.parse_bytes(units.format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.005, abs=0.5)


@given(BYTES, BYTES)
def test_formatted_bytes_keep_order(one: int, other: int) -> None:
    """The larger of two sizes never reads as the smaller."""
    small, large = sorted((one, other))
    assert units.parse_bytes(units.format_bytes(small)) <= units.parse_bytes(units.format_bytes(large))


@given(st.integers(1, 2**40), st.sampled_from(["", "B", "KiB", "MiB", "GiB", "TiB"]), st.booleans(), st.booleans())
def test_sizes_are_read_exactly(number: int, unit: str, spaced: bool, lower: bool) -> None:
    """A whole number of a binary unit is exactly that many bytes, whatever the case and the space."""
    exponent = ["", "KiB", "MiB", "GiB", "TiB"].index(unit if unit != "B" else "")
    text = f"{number}{' ' if spaced else ''}{unit.lower() if lower else unit}"
    assert units.parse_bytes(text) == number * 1024**exponent


def test_decimal_and_bare_units() -> None:
    """GB is decimal as written; a bare G is binary; parts of a unit are exact where floats would not be."""
    assert units.parse_bytes("24GB") == 24 * 10**9
    assert units.parse_bytes("24G") == units.parse_bytes("24GiB") == 24 * 2**30
    assert units.parse_bytes("1.1GB") == 1_100_000_000
    assert units.parse_bytes("0.5 KiB") == 512


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "1e3", "12 parsecs", "1,5GiB", "0", "0.0GiB", "1GiB2", "nan", "inf"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    """Anything but a number above zero and a known unit is refused with an example of what would do."""
    with pytest.raises(UsageError, match=r"memory .*GiB"):
        units.parse_bytes(text)


def test_bytes_as_people_read_them() -> None:
    """Three digits, binary units, never GB."""
    assert units.format_bytes(0) == "0 B"
    assert units.format_bytes(1023) == "1023 B"
    assert units.format_bytes(2_604_719_176) == "2.43 GiB"
    assert units.format_bytes(512 * units.MIB) == "512 MiB"
    assert units.format_bytes(80 * units.GIB) == "80.0 GiB"
    assert units.format_bytes(-units.MIB) == "-1.00 MiB"


@given(st.integers(0, 10**15))
def test_counts_round_trip(count: int) -> None:
    """A count reads back within half of its third digit."""
    assert read_count(units.format_count(count)) == pytest.approx(count, rel=0.005)


@given(st.floats(0, 10**7))
def test_durations_round_trip(seconds: float) -> None:
    """A duration reads back within the smallest unit that it shows."""
    tolerance = (
        0.00051
        if seconds < 0.0995
        else 0.051
        if seconds < 10
        else 0.51
        if seconds < 3600
        else 60
        if seconds < 86400
        else 3600
    )
    assert abs(read_duration(units.format_duration(seconds)) - seconds) <= tolerance


@given(st.floats(0, 10**7), st.floats(0, 10**7))
def test_durations_keep_order(one: float, other: float) -> None:
    """The longer of two durations never reads as the shorter."""
    short, long = sorted((one, other))
    assert read_duration(units.format_duration(short)) <= read_duration(units.format_duration(long))


@pytest.mark.parametrize("write", [units.format_bytes, units.format_count])
def test_no_more_than_four_digits(write: Callable[[int], str]) -> None:
    """Across every power of ten, a figure stays short enough to read at a glance."""
    for power in range(15):
        for factor in (1, 1.2345, 9.99, 9.999):
            assert sum(letter.isdigit() for letter in write(int(10**power * factor))) <= 4


def test_nearest_names() -> None:
    """A name misspelt in letters or case finds the one meant; one like nothing finds nothing."""
    known = ["smollm2-135m", "llama-3.1-8b", "qwen2.5-7b"]
    assert nearest("SmolLM2-136M", known)[0] == "smollm2-135m"
    assert did_you_mean("lama-3.1-8b", known).startswith("; did you mean llama-3.1-8b")
    assert did_you_mean("zzz", known) == ""


def test_errors_are_what_a_caller_would_catch() -> None:
    """Every error of ours is a BrimError and says in its class which builtin it is."""
    for kind in BrimError.__subclasses__():
        assert kind.__doc__
        assert len(kind.__mro__) > 3
