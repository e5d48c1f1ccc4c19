"""Number formats and what a number becomes in each, against struct, gguf-py and the published grids. No torch."""

import math
import struct
from fractions import Fraction

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brim.errors import UnknownNameError, UsageError
from brim.models.safetensors_header import DTYPES
from brim.numerics.formats import FORMATS, SAFETENSORS_CODES, number_format
from brim.numerics.granularity import PerChannel, PerGroup, PerTensor
from brim.numerics.represent import fitted_scale, represent, round_to_float

FINITE = st.floats(allow_nan=False, allow_infinity=False)
GGML = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0,
        "mxfp4": gguf.GGMLQuantizationType.MXFP4}  # fmt: skip


def packed(code: str, number: float) -> float:
    """The number as `struct` stores it: C's own rounding; Inf where struct says that it overflows."""
    try:
        return float(struct.unpack(code, struct.pack(code, number))[0])
    except OverflowError:
        return math.copysign(math.inf, number)


def same(one: float, other: float) -> bool:
    """Equal, the sign of zero included."""
    return one == other and math.copysign(1, one) == math.copysign(1, other)


@given(st.one_of(FINITE, st.floats(width=16, allow_nan=False, allow_infinity=False), st.floats(-1e-4, 1e-4)))
@example(65519.99)
@example(65520.0)
@example(2.0**-25)
@example(3 * 2.0**-25)
@example(-0.0)
def test_half_and_single_are_those_of_c(number: float) -> None:
    """FP16 and FP32 values are what C's conversions give: ties to even, subnormals kept, overflow to Inf."""
    assert same(round_to_float(FORMATS["fp16"], number), packed("<e", number))
    assert same(round_to_float(FORMATS["fp32"], number), packed("<f", number))


def all_values(name: str) -> list[float]:
    """Every finite value of a small float format, from its definition: sign, exponent, fraction."""
    row = FORMATS[name]
    values = set()
    for exponent in range(2**row.exponent_bits):
        if row.top_exponent == "inf-nan" and exponent == 2**row.exponent_bits - 1:
            continue
        for fraction in range(2**row.fraction_bits):
            if row.top_exponent == "nan" and exponent == 2**row.exponent_bits - 1 and fraction == 7:
                continue
            lead = 1 if exponent else 0
            power = max(exponent, 1) - (2 ** (row.exponent_bits - 1) - 1)
            values.add((lead + fraction / 2**row.fraction_bits) * 2.0**power)
    return sorted(values | {-value for value in values if value})


SMALL = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "mxfp4": 6.0}


@pytest.mark.parametrize("name", SMALL)
def test_small_floats_are_enumerated(name: str) -> None:
    """Largest, smallest, least normal and step are those of the list of all values; the list is as published."""
    row, values = FORMATS[name], all_values(name)
    assert row.largest == values[-1] == SMALL[name]
    assert row.smallest == min(value for value in values if value > 0)
    assert row.step == min(value for value in values if value > 1) - 1
    if name == "mxfp4":
        assert [value for value in values if value >= 0] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@given(st.sampled_from(sorted(SMALL)), st.one_of(FINITE, st.floats(-500, 500), st.floats(-1e-2, 1e-2)))
def test_small_floats_round_to_the_nearest(name: str, number: float) -> None:
    """No value of the format is nearer than the one chosen; what is past the largest saturates or becomes Inf."""
    row = FORMATS[name]
    found = round_to_float(row, number)
    if math.isinf(found):
        assert name == "fp8_e5m2"
        assert abs(number) >= 61440  # halfway to the next power of two
        return
    distances = [abs(Fraction(value) - Fraction(number)) for value in all_values(name)]
    assert abs(Fraction(found) - Fraction(number)) == min(distances)


@given(st.sampled_from(sorted(FORMATS)), FINITE)
def test_what_is_representable_stays(name: str, number: float) -> None:
    """Rounding twice is rounding once, rounding is odd, and `error` is the difference."""
    row = FORMATS[name]
    found = represent(row, number, scale=None if row.scale == "none" else 1.0)
    assert represent(row, -number, scale=found.scale).value == -found.value or name in ("nf4", "q4_0")
    if math.isfinite(found.value):
        assert represent(row, found.value, scale=found.scale).value == found.value
        assert Fraction(found.error) == pytest.approx(Fraction(found.value) - Fraction(number), rel=1e-12)
    else:
        assert found.to_dict()["value"] is None


def test_a_fraction_past_all_floats_rounds_too() -> None:
    """Scales are divided as fractions, which may leave what 64 bits hold: they saturate, they do not crash."""
    huge = Fraction(10) ** 400
    assert round_to_float(FORMATS["fp32"], -huge) == -math.inf
    assert represent(FORMATS["mxfp4"], -1e308, scale=1e-300).code == -6
    assert same(round_to_float(FORMATS["fp16"], -1 / huge), -0.0)


# Where the fp16 scale of ggml's blocks is normal; below, ggml makes codes for a scale that it does not store.
NORMAL_BLOCKS = st.floats(2.0**-6, 2.0**16, width=32).flatmap(lambda value: st.sampled_from((value, -value)))


@given(st.sampled_from(sorted(GGML)), NORMAL_BLOCKS)
@example("q4_0", 0.0)
@example("q8_0", 0.0)
@example("mxfp4", 5.0)
@example("mxfp4", 7.9)
def test_blocks_of_one_number_are_ggmls(name: str, number: float) -> None:
    """A number alone in a block becomes what gguf-py's quantize and dequantize make of it, to fp32's last digit."""
    block = np.full((1, 32), number, dtype=np.float32)
    theirs = float(gguf.dequantize(gguf.quantize(block, GGML[name]), GGML[name])[0, 0])
    assert represent(FORMATS[name], number).value == pytest.approx(theirs, rel=2**-23, abs=0)


@given(st.one_of(FINITE, st.floats(1e-38, 1e38)), st.sampled_from([n for n, r in FORMATS.items() if r.scale != "none"]))
def test_a_fitted_scale_uses_the_format(number: float, name: str) -> None:
    """The scale is a value of its own format, and where it is not at the limits the number keeps its leading bits."""
    row = FORMATS[name]
    scale = fitted_scale(row, number)
    if row.scale == "power-of-two":
        assert math.frexp(scale)[0] == 0.5
    else:
        assert same(round_to_float(FORMATS[row.scale_format], scale), scale)
    stored = FORMATS[row.scale_format] if row.scale_format in FORMATS else FORMATS["bf16"]
    if 2 * (stored.smallest_normal or 0) <= abs(number) / row.largest and abs(scale) < stored.largest / 2:
        error = abs(represent(row, number).error)
        assert error <= abs(number) * (0.25 if row.kind == "float" else 2**-10)


def test_nf4_is_the_published_grid() -> None:
    """16 ascending values with -1, 0 and 1, as QLoRA prints them to four digits; each is nearest to itself."""
    grid = FORMATS["nf4"].grid
    printed = (-1, -.6962, -.5251, -.3949, -.2844, -.1848, -.0911, 0,
               .0796, .1609, .2461, .3379, .4407, .5626, .7230, 1)  # fmt: skip
    assert list(grid) == sorted(set(grid))
    assert grid == pytest.approx(printed, abs=5.1e-5)
    assert [represent(FORMATS["nf4"], value, scale=1.0).code for value in grid] == list(grid)


@given(st.floats(-1, 1))
def test_nf4_takes_the_nearest_of_the_grid(number: float) -> None:
    """No other value of the grid is nearer."""
    found = represent(FORMATS["nf4"], number, scale=1.0).value
    assert abs(found - number) == min(abs(value - number) for value in FORMATS["nf4"].grid)


@pytest.mark.parametrize(("name", "kind"), [*GGML.items(), ("fp16", gguf.GGMLQuantizationType.F16),
                                            ("bf16", gguf.GGMLQuantizationType.BF16)])  # fmt: skip
def test_sizes_are_ggmls(name: str, kind: gguf.GGMLQuantizationType) -> None:
    """Bytes of whole blocks are those of gguf's table."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    for count in (1, 7, 1000):
        assert FORMATS[name].nbytes(count * block) == count * nbytes


@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 10**6))
def test_bytes_hold_the_bits(name: str, numel: int) -> None:
    """Nothing takes nothing; one element more never takes less; a part of a block has a scale of its own."""
    row = FORMATS[name]
    assert row.nbytes(0) == 0
    assert row.nbytes(numel) <= row.nbytes(numel + 1)
    bits = numel * row.element_bits + (math.ceil(numel / row.block) * row.scale_bits if row.block else 0)
    assert bits <= 8 * row.nbytes(numel) < bits + 16


def test_each_row_is_known_to_files_by_its_bits() -> None:
    """A format that safetensors can hold has there the bits of its row, and the inverse table loses none."""
    assert len(SAFETENSORS_CODES) == len(DTYPES)
    for row in FORMATS.values():
        if row.safetensors_code is not None:
            assert DTYPES[row.safetensors_code] == (row.name, row.element_bits)
    assert {row.name for row in FORMATS.values() if row.safetensors_code} == {
        "fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8",
    }  # fmt: skip


def test_an_unknown_format_names_the_known() -> None:
    """A misspelt format is refused with the nearest name and the list."""
    assert number_format("int8") is FORMATS["int8"]
    with pytest.raises(UnknownNameError, match=r"'itn8'; did you mean int8.*formats: fp32, fp16"):
        number_format("itn8")


@given(st.integers(0, 64), st.integers(1, 64), st.integers(1, 16))
def test_scales_are_as_many_as_their_groups(rows: int, inputs: int, size: int) -> None:
    """One for all, one a row, one a group; groups that do not fill a row are refused."""
    assert PerTensor().scale_shape((rows, inputs)) == (1,)
    assert PerChannel().scale_shape((rows, inputs)) == (rows, 1)
    if inputs % size:
        with pytest.raises(UsageError, match=f"rows of {inputs} elements do not divide into groups of {size}"):
            PerGroup(size).scale_shape((rows, inputs))
    else:
        assert PerGroup(size).scale_shape((rows, inputs)) == (rows, inputs // size)


def test_a_group_of_nothing_is_refused() -> None:
    """A group holds at least one element."""
    with pytest.raises(UsageError, match="group size 0"):
        PerGroup(0)
