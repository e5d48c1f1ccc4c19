"""INT8 in few passes, against the reference encoder and against sums in FP64."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from brim.checkpoints.integer_rows import encode_rows
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import RowSums, add_up
from brim.numerics.encode import decode, encode_integer
from brim.numerics.granularity import PerChannel, PerGroup

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def random_weight(seed: int, rows: int, inputs: int, dtype: torch.dtype, *, any_bits: bool) -> Tensor:
    """Normal values, or any finite bit patterns: subnormal ones, negative zeros, the largest."""
    generator = torch.Generator().manual_seed(seed)
    if not any_bits:
        return torch.randn(rows, inputs, generator=generator).to(dtype)
    info = torch.iinfo(BITS[dtype])
    bits = torch.randint(info.min, info.max, (rows, inputs), generator=generator, dtype=BITS[dtype])
    values = bits.view(dtype)
    return torch.where(torch.isfinite(values), values, torch.zeros_like(values))


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 70), st.sampled_from(DTYPES), st.booleans(), st.booleans(),
    st.integers(0, 3), st.sampled_from(["int8", "int4"]),
)  # fmt: skip
@example(0, 1, 1, torch.float32, True, True, 0, "int8")
@example(0, 3, 32, torch.float16, False, True, 2, "int4")
def test_codes_and_scales_are_the_references(
    seed: int, rows: int, inputs: int, dtype: torch.dtype, any_bits: bool, zero: bool, groups: int, format: str
) -> None:
    """Codes, scales and clipped elements are those of `numerics.encode`, bit by bit, also by group; sums are those of
    FP64."""
    weight = random_weight(seed, rows, inputs * max(1, groups), dtype, any_bits=any_bits)
    granularity = PerGroup(inputs) if groups else PerChannel()
    if zero:
        weight[-1] = 0
    expected = encode_integer(weight, format=format, granularity=granularity, scale_dtype=dtype)
    scratch = Scratch()
    for _ in range(2):  # memory that was used before changes nothing
        (codes, scale), sums, decoded = encode_rows(
            weight.clone(), scratch, scale_dtype=dtype, format=format, granularity=granularity
        )
        assert torch.equal(decoded(), decode(expected.codes, expected.scale, granularity=granularity))
        assert torch.equal(codes, expected.codes)
        assert torch.equal(scale.view(expected.scale.shape), expected.scale)
    assert isinstance(sums, RowSums)
    found = add_up([sums])
    exact, back = weight.double(), decode(expected.codes, expected.scale, granularity=granularity).double()
    assert (found.clipped, found.elements) == (expected.num_clipped, weight.numel())
    assert found.zeroed == int((exact != 0).sum()) - int((expected.codes != 0).sum())
    assert found.zero_rows == int((exact == 0).all(dim=1).sum())
    assert found.largest == float(exact.abs().max())
    scales = expected.scale.double()
    assert math.sqrt(found.signal) == pytest.approx(float(exact.norm()), rel=1e-4, abs=float(scales.max()) * 1e-4)
    worst = float((back - exact).abs().max())
    assert found.largest_error == pytest.approx(worst, rel=1e-4, abs=float(scales.max()) * 2e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_sums_add_up(seed: int, sizes: list[int]) -> None:
    """Rows in several blocks have the sums of the rows in one."""
    weight = random_weight(seed, sum(sizes), 32, torch.float32, any_bits=False)
    whole = encode_rows(weight, Scratch(), scale_dtype=torch.float32).statistics
    parts = [encode_rows(part, Scratch(), scale_dtype=torch.float32).statistics for part in weight.split(sizes)]
    assert isinstance(whole, RowSums)
    assert add_up([part for part in parts if isinstance(part, RowSums)]) == add_up([whole])
