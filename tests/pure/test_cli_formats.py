"""`brim formats` as a user types it."""

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brim.cli import main
from brim.numerics.formats import FORMATS

Captured = pytest.CaptureFixture[str]


def json_of(capsys: Captured, *arguments: str) -> Any:
    assert main(["formats", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def becomes(result: Any, name: str) -> list[Any]:
    return next(row["becomes"] for row in result["formats"] if row["name"] == name)


def test_pi(capsys: Captured) -> None:
    """3.14159265 is 3.140625 in FP16 and BF16, 3 in INT8 at scale 1, and 127 steps of the scale fitted to it."""
    result = json_of(capsys, "3.14159265")
    assert (result["schema"], result["number"]) == (1, 3.14159265)
    assert [becomes(result, name)[0]["value"] for name in ("fp16", "bf16")] == [3.140625, 3.140625]
    plain, fitted = becomes(result, "int8")
    assert (plain["value"], plain["code"], plain["scale"], plain["scale_choice"]) == (3.0, 3.0, 1.0, "1")
    assert (fitted["code"], fitted["scale_choice"]) == (127.0, "fitted")
    assert fitted["scale"] == pytest.approx(3.14159265 / 127, rel=2**-24)
    assert fitted["value"] == pytest.approx(3.14159265, rel=2**-24)


def test_the_table_says_the_same(capsys: Captured) -> None:
    """The table has the values of the JSON; what is data is on stdout, what explains it on stderr."""
    assert main(["formats", "3.14159265"]) == 0
    captured = capsys.readouterr()
    for line in (
        r"fp16 +3\.140625 +-0\.000968",
        r"bf16 +3\.140625",
        r"int8 +3 +-0\.142 +1 +3",
        r"int8 +3\.14159\d+ .*fitted +127",
    ):
        assert re.search(line, captured.out), line
    assert "layout:" in captured.err
    assert "layout:" not in captured.out
    assert {line.split()[0] for line in captured.out.splitlines() if line.strip()} == {"format", *FORMATS}


def test_without_a_number_the_formats_alone(capsys: Captured) -> None:
    """Without a number: a row a format, and how to ask for one. The keys are the same every time."""
    assert main(["formats"]) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["format", *FORMATS]
    assert "brim formats 3.14159265" in captured.err
    result = json_of(capsys)
    assert result["number"] is None
    assert {tuple(row) for row in result["formats"]} == {(
        "name", "kind", "bits", "sign_bits", "exponent_bits", "fraction_bits", "largest", "smallest_normal",
        "smallest", "step", "block", "scale_bits", "scale_format", "safetensors", "bytes_per_billion",
    )}  # fmt: skip
    for row in result["formats"]:
        if row["kind"] == "float":
            assert row["sign_bits"] + row["exponent_bits"] + row["fraction_bits"] == row["bits"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nan", "not a finite number"), ("inf", "not a finite number"), ("-inf", "not a finite number"),
        ("text", "'text' is not a number"), ("", "'' is not a number"), ("0x10", "'0x10' is not a number"),
        ("--bogus", "'--bogus' is not a number"), ("snan", "not a number"),
        ("1e400", "outside what 64 bits hold"), ("-1e400", "outside what 64 bits hold"),
        ("1e-400", "outside what 64 bits hold"), ("1e99999999999999999999", "1e99999999999999999999"),
    ],
)  # fmt: skip
def test_what_is_no_number_is_refused(text: str, said: str, capsys: Captured) -> None:
    """What is not a finite number of 64 bits ends with 2 and one line that says why; nothing is on stdout."""
    assert main(["formats", text]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "value"), [("-5", -5.0), ("0", 0.0), ("-0", 0.0), ("5e-324", 5e-324), ("1e308", 1e308)]
)
def test_odd_numbers_are_answered(text: str, value: float, capsys: Captured) -> None:
    """Negative numbers need no `--`; zero is zero everywhere; the ends of 64 bits are answered, overflow as null."""
    result = json_of(capsys, text)
    assert result["number"] == value
    values = [found["value"] for row in result["formats"] for found in row["becomes"]]
    if abs(value) == 5:
        # A lone number is exact in every format but those whose scale (fp16) or grid (MXFP4) cannot reach it.
        assert becomes(result, "fp8_e4m3")[0]["value"] == -5
        assert becomes(result, "mxfp4")[0]["value"] == -4
    elif abs(value) < 1:
        assert values == [0.0] * len(values)
    else:
        assert becomes(result, "fp32")[0]["value"] is None
        assert becomes(result, "fp8_e4m3")[0]["value"] == 448
    assert main(["formats", text]) == 0
    assert ("overflow" in capsys.readouterr().out) == (value > 1e300)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_has_an_answer(number: float, capsys: Captured) -> None:
    """Any finite number is answered in both forms, and the JSON holds it digit by digit."""
    assert json_of(capsys, repr(number))["number"] == number
    assert main(["formats", repr(number)]) == 0
    capsys.readouterr()
