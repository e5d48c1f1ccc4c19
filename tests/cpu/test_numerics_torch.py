"""Number formats and encoders against torch's own casts, compressed-tensors and exact arithmetic."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

import brim.layers.packed_experts  # noqa: F401  FakeWorld patches it, and it cannot be imported on fake tensors
from brim.errors import UsageError
from brim.memory.fake import FakeWorld
from brim.numerics.encode import TORCH_DTYPES, _largest_scale, absmax_scale, decode, encode_integer
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor
from brim.numerics.represent import represent, round_to_float

FLOATS = sorted(name for name, row in FORMATS.items() if row.kind == "float" and row.scale == "none")


@pytest.mark.parametrize("name", FLOATS)
def test_rows_are_torchs_finfo(name: str) -> None:
    """Largest, least normal, least, step and size of a float format are torch's."""
    row, info = FORMATS[name], torch.finfo(TORCH_DTYPES[name])
    assert (row.largest, row.smallest_normal, row.step) == (info.max, info.smallest_normal, info.eps)
    assert (row.element_bits, row.nbytes(1)) == (info.bits, TORCH_DTYPES[name].itemsize)
    assert row.smallest == info.smallest_normal * info.eps


def near_boundaries(name: str) -> list[float]:
    """Overflow, its tie, the last subnormals and theirs, in exact powers of two."""
    row = FORMATS[name]
    half_step = 2.0 ** (row.max_exponent - row.fraction_bits - 1)
    ties = [
        row.largest,
        row.largest + half_step,
        row.smallest / 2,
        row.smallest * 1.5,
        row.smallest * 2.5,
        1 + row.step / 2,
    ]
    values = [t * f for t in ties for f in (1, 1 - 2**-20, 1 + 2**-20)]
    return [float(np.float32(value)) for value in values if value < 3.4e38]


SINGLES = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("name", FLOATS)
@given(
    st.lists(
        st.one_of(SINGLES, st.floats(-600, 600, width=32), st.floats(-(2.0**-14), 2.0**-14, width=32)), max_size=40
    )
)
@example([])
def test_values_are_torchs_casts(name: str, drawn: list[float]) -> None:
    """Each FP32 number becomes in each float format what torch's cast gives: subnormals, ties and overflow too."""
    numbers = drawn + [sign * value for value in near_boundaries(name) for sign in (1, -1)]
    cast = torch.tensor(numbers, dtype=torch.float32).to(TORCH_DTYPES[name]).float().tolist()
    ours = [round_to_float(FORMATS[name], number) for number in numbers]
    assert [(value, math.copysign(1, value)) for value in ours] == [(value, math.copysign(1, value)) for value in cast]


MATRICES = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 4).map(lambda groups: 4 * groups)),
    elements=st.one_of(
        st.just(0.0), st.floats(-8, 8, width=32), st.floats(-(2.0**100), 2.0**100, width=32),
    ),
)  # fmt: skip
GRANULARITIES: dict[str, Granularity] = {"tensor": PerTensor(), "channel": PerChannel(), "group:4": PerGroup(4)}


def in_blocks(matrix: Any, how: str) -> list[tuple[int, list[tuple[int, int]]]]:
    """(block number, its places), spelled out: the brute force beside `view` and `unflatten`."""
    rows, inputs = matrix.shape
    blocks: dict[int, list[tuple[int, int]]] = {}
    for row in range(rows):
        for column in range(inputs):
            number = {"tensor": 0, "channel": row, "group:4": row * (inputs // 4) + column // 4}[how]
            blocks.setdefault(number, []).append((row, column))
    return list(blocks.items())


@pytest.mark.parametrize("how", GRANULARITIES)
@pytest.mark.parametrize("format", ["int8", "int4"])
@given(MATRICES)
def test_codes_and_scales_by_brute_force(how: str, format: str, matrix: Any) -> None:
    """Scale = absmax / last code in FP32; each code is the nearest; the error is at most half a step; zeros stay."""
    weight = torch.from_numpy(matrix)
    encoded = encode_integer(weight, format=format, granularity=GRANULARITIES[how])
    decoded = decode(encoded.codes, encoded.scale, granularity=GRANULARITIES[how])
    last = FORMATS[format].codes[1]
    assert encoded.num_clipped == 0
    assert encoded.codes.dtype == torch.int8
    assert encoded.codes.shape == decoded.shape == weight.shape
    for number, places in in_blocks(matrix, how):
        scale = float(encoded.scale.flatten()[number])
        largest = max(abs(float(matrix[place])) for place in places)
        expected = float(np.float32(largest) / np.float32(last))
        assert scale == (expected or 1.0)
        for place in places:
            code, value = int(encoded.codes[place]), float(matrix[place])
            assert abs(code) <= last
            assert abs(Fraction(value) - code * Fraction(scale)) <= Fraction(scale) * Fraction(0.500001)
            assert float(decoded[place]) == np.float32(code) * np.float32(scale)
            assert code or abs(value) <= scale / 2


@given(st.floats(-100, 100, width=32), st.sampled_from(["int8", "int4"]))
def test_tensors_and_numbers_agree(number: float, format: str) -> None:
    """A matrix of one number is encoded as `represent` says, whose arithmetic is exact."""
    encoded = encode_integer(torch.tensor([[number]]), format=format)
    exact = represent(FORMATS[format], number)
    assert float(encoded.scale) == pytest.approx(exact.scale, rel=2**-22)
    assert abs(int(encoded.codes)) == abs(exact.code or 0)


def their_args(how: str, bits: int) -> QuantizationArgs:
    strategy, _, size = how.partition(":")
    return QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy=strategy, group_size=int(size) if size else None
    )


@pytest.mark.parametrize("how", GRANULARITIES)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_codes_are_compressed_tensors(how: str, format: str) -> None:
    """Given our scales, compressed-tensors makes the same codes, and of the codes the same weights."""
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    encoded = encode_integer(weight, format=format, granularity=GRANULARITIES[how])
    args = their_args(how, FORMATS[format].element_bits)
    scale = encoded.scale
    theirs = quantize(weight, scale, torch.zeros_like(scale), args, dtype=torch.int8)
    assert torch.equal(theirs, encoded.codes)
    back = dequantize(theirs, scale, args=args, dtype=torch.float32)
    assert torch.equal(back, decode(encoded.codes, encoded.scale, granularity=GRANULARITIES[how]))
    assert QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_decode_within_the_dtype(dtype: torch.dtype) -> None:
    """Weights up to their dtype's largest decode in that dtype to finite numbers, half a step away at most."""
    largest = torch.finfo(dtype).max
    weight = torch.tensor([[largest, -largest], [largest / 2, 1.0], [1.0, 0.3]], dtype=dtype)
    encoded = encode_integer(weight, scale_dtype=dtype)
    decoded = encoded.codes.to(dtype) * encoded.scale
    assert encoded.scale.dtype == dtype
    assert bool(decoded.isfinite().all())
    assert bool(decode(encoded.codes, encoded.scale).isfinite().all())
    error = (encoded.codes.double() * encoded.scale.double() - weight.double()).abs()
    assert bool((error <= 0.5001 * encoded.scale.double()).all())


@given(MATRICES, st.sampled_from([torch.float16, torch.bfloat16]))
def test_codes_are_made_for_the_scale_as_stored(matrix: Any, dtype: torch.dtype) -> None:
    """In half precision too the error is at most half a step of the stored scale but for the clipped."""
    weight = torch.from_numpy(matrix).clamp(-60000, 60000)
    encoded = encode_integer(weight, scale_dtype=dtype)
    error = (encoded.codes.double() * encoded.scale.double() - weight.double()).abs() / encoded.scale.double()
    assert int((error > 0.5001).sum()) <= encoded.num_clipped
    if bool((encoded.scale.float() >= torch.finfo(dtype).smallest_normal).all()):
        assert encoded.num_clipped == 0


def test_what_a_scale_cannot_hold_is_counted() -> None:
    """A scale that FP16 rounds down too far clips; one that it stores as zero leaves zeros, at scale 1."""
    clipping = torch.tensor([[127 * 8e-8, 127 * 4e-8, 0.0]])
    encoded = encode_integer(clipping, scale_dtype=torch.float16)
    assert encoded.num_clipped == 1
    assert encoded.codes.tolist() == [[127, 85, 0]]
    vanishing = encode_integer(torch.tensor([[1e-7, -1e-7]]), scale_dtype=torch.float16)
    assert (vanishing.codes.tolist(), vanishing.scale.tolist()) == ([[0, 0]], [[1.0]])


@pytest.mark.parametrize("how", GRANULARITIES)
def test_strides_do_not_matter(how: str) -> None:
    """A transposed view is encoded as its copy."""
    base = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    granularity = GRANULARITIES[how]
    view, copied = (encode_integer(w, granularity=granularity) for w in (base.t(), base.t().contiguous()))
    assert torch.equal(view.codes, copied.codes)
    assert torch.equal(view.scale, copied.scale)
    assert torch.equal(*(decode(e.codes, e.scale, granularity=granularity) for e in (view, copied)))


def test_groups_fill_the_rows() -> None:
    """Groups that do not fill a row are refused; no rows at all are no rows of scales."""
    with pytest.raises(UsageError, match="rows of 6 elements do not divide into groups of 4"):
        encode_integer(torch.ones(2, 6), granularity=PerGroup(4))
    empty: Tensor = encode_integer(torch.ones(0, 6)).scale
    assert empty.shape == (0, 1)
    assert absmax_scale(torch.ones(0, 6), largest_code=127, dtype=torch.float32).shape == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("largest_code", [3.0, 6.0, 7.0, 7.5, 15.0, 127.0, 448.0])
def test_no_scale_is_cut_by_a_rehearsal_before(largest_code: float, dtype: torch.dtype) -> None:
    """The largest element's scale is the largest number of its dtype whose last code is finite, though fake weights
    were encoded before: what is kept between the two has no fake tensor's value."""
    _largest_scale.cache_clear()
    with FakeWorld():
        absmax_scale(torch.ones(1, 4, dtype=dtype), largest_code=largest_code, dtype=dtype)
    largest = torch.tensor([[torch.finfo(dtype).max]], dtype=dtype)
    scale = absmax_scale(largest, largest_code=largest_code, dtype=dtype)
    above = torch.nextafter(scale, torch.full_like(scale, math.inf))
    assert scale.item() * largest_code <= torch.finfo(dtype).max < above.item() * largest_code
