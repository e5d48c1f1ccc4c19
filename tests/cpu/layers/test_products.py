"""Products with packed weights, whichever kernel is chosen, against the dense product with the unpacked weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from brim.layers import products
from brim.layers.int8_nibbles import IS_KNOWN_ORDER, Int8Nibbles
from brim.layers.packed_embedding import PackedEmbedding, tie
from brim.layers.packed_linear import PackedLinear
from brim.layers.packing import Fp8, Int4, Int4Kernel, Int8, Int8Words, Nf4, Packing

CPU = torch.device("cpu")
PACKINGS: dict[str, Packing] = {
    "int8": Int8(), "int8, groups": Int8(group_size=32), "words": Int8Words(group_size=None),
    "words, groups": Int8Words(group_size=32), "int4": Int4(group_size=32), "nf4": Nf4(nested=False),
    "nf4, nested": Nf4(nested=True), "fp8": Fp8(),
}  # fmt: skip
PRECISION = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(packing: Packing, weight_RK: Tensor, bias_R: Tensor | None = None) -> PackedLinear:
    rows, inputs = weight_RK.shape
    bias = None if bias_R is None else nn.Parameter(bias_R)
    layer = PackedLinear(inputs, rows, bias=bias, packing=packing, compute=weight_RK.dtype, device=CPU)
    layer.pack(weight_RK)
    return layer


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the expected, over all elements."""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-6))


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(PACKINGS)),
    tokens=st.sampled_from([1, 2, 15, 16, 17, 40]),
    rows=st.sampled_from([1, 7, 16, 33, 48, 64, 192]),
    groups=st.integers(1, 4),
    dtype=st.sampled_from(list(PRECISION)),
    has_bias=st.booleans(),
    block=st.sampled_from([1, 200, 2**20]),
    seed=st.integers(0, 9),
)
def test_every_kernel_computes_the_dense_product(
    name: str, tokens: int, rows: int, groups: int, dtype: torch.dtype, has_bias: bool, block: int, seed: int
) -> None:
    """Any packing, shape, dtype and bias, in the file's order or a kernel's: it is the unpacked weight's product."""
    inputs = 32 * groups
    bias_R = random(rows, dtype=dtype, seed=1) if has_bias else None
    layer = packed(PACKINGS[name], random(rows, inputs, dtype=dtype, seed=seed), bias_R)
    input = random(tokens, inputs, dtype=dtype, seed=seed + 1).view(1, tokens, inputs)
    weight_RK = layer.unpacked()
    expected = F.linear(input.float(), weight_RK.float(), None if bias_R is None else bias_R.float())
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(products, "_BLOCK_ELEMENTS", block)
        for _ in range(2):
            found = layer(input)
            assert (found.shape, found.dtype) == ((1, tokens, rows), dtype)
            assert distance(found, expected) < PRECISION[dtype]
            layer.rearrange()
    assert torch.equal(layer.unpacked(), weight_RK)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), inputs=st.integers(1, 80), tokens=st.integers(1, 20), seed=st.integers(0, 9))
def test_int8_of_any_width(rows: int, inputs: int, tokens: int, seed: int) -> None:
    """Widths that are no multiple of 16, which the kernel reads past, are multiplied rightly, too."""
    layer = packed(Int8(), random(rows, inputs, dtype=torch.bfloat16, seed=seed))
    input_TK = random(tokens, inputs, dtype=torch.bfloat16, seed=seed + 1)
    with torch.no_grad():
        found = layer(input_TK)
    # a sum that cancels has a large relative error in BF16, whoever adds it up
    allowed = 0.02 * float(input_TK.float().norm() * layer.unpacked().float().norm())
    assert float((found.float() - input_TK.float() @ layer.unpacked().float().T).norm()) < allowed


@pytest.mark.parametrize("dtype", list(PRECISION))
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_rounded_inputs_are_multiplied_as_integers(dtype: torch.dtype, tokens: int) -> None:
    """With `rounds_inputs`, the product is that of inputs rounded to 127 steps of each row's largest."""
    layer = packed(Int8(rounds_inputs=True), random(24, 64, dtype=dtype))
    input_TK = random(tokens, 64, dtype=dtype, seed=1)
    input_TK[0] = 0
    step_T1 = (input_TK.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    rounded_TK = (input_TK.float() / step_T1).round() * step_T1
    with torch.no_grad():
        found = layer(input_TK)
    expected = rounded_TK @ layer.unpacked().float().T
    assert torch.allclose(found.float(), expected, rtol=3 * PRECISION[dtype], atol=3 * PRECISION[dtype])
    assert tokens == 1 or not torch.equal(found.float(), F.linear(input_TK, layer.unpacked()).float())


def test_int4_goes_into_the_kernels_order_where_it_fits() -> None:
    """BF16 and whole sixteens of rows are rearranged, as many bytes of codes; all else stays as files hold it."""
    fits = packed(Int4(group_size=32), random(32, 64, dtype=torch.bfloat16))
    code_bytes = fits.held["weight"].nbytes
    fits.rearrange()
    assert isinstance(fits.packing, Int4Kernel) and fits.held["weight"].nbytes == code_bytes
    for weight_RK in (random(24, 64, dtype=torch.bfloat16), random(32, 64)):
        layer = packed(Int4(group_size=32), weight_RK)
        layer.rearrange()
        assert isinstance(layer.packing, Int4)


@pytest.mark.parametrize("tokens", [1, 16])
def test_nibbles_multiply_every_code_exactly(tokens: int) -> None:
    """For each of the codes, each place in a block and one input of all, the product is code x scale, rounded once."""
    inputs = 256
    codes_RK = torch.arange(128 * inputs).mul_(37).remainder_(255).sub_(127).to(torch.int8).view(128, inputs)
    held = {"weight": codes_RK, "scale": random(128, 1, dtype=torch.bfloat16).abs()}
    nibbles = Int8Nibbles().rearrange(held)
    assert torch.equal(
        Int8Nibbles().unpack(nibbles, 128, inputs, torch.bfloat16), Int8().unpack(held, 128, inputs, torch.bfloat16)
    )
    expected_KR = (codes_RK.float() * held["scale"].float()).t().bfloat16()
    if IS_KNOWN_ORDER:
        one_KK = torch.eye(inputs, dtype=torch.bfloat16)
        found = [Int8Nibbles().product(one_TK, nibbles) for one_TK in one_KK.split(tokens)]
        assert torch.equal(torch.cat(found), expected_KR)


def test_int8_goes_into_nibbles_where_they_cost_little() -> None:
    """Whole blocks of outputs and groups of inputs in BF16: no byte of codes more, and scales of at most an eighth."""
    layer = packed(Int8(), random(64, 192, dtype=torch.bfloat16))
    code_bytes = layer.held["weight"].nbytes
    layer.rearrange()
    assert isinstance(layer.packing, Int8Nibbles) == IS_KNOWN_ORDER
    assert layer.held["weight"].nbytes == code_bytes and layer.held["scale"].nbytes <= code_bytes / 8
    for weight_RK in (random(48, 192, dtype=torch.bfloat16), random(64, 96, dtype=torch.bfloat16), random(64, 192)):
        layer = packed(Int8(), weight_RK)
        layer.rearrange()
        assert isinstance(layer.packing, Int8)


def test_an_embedding_gives_its_unpacked_rows_and_is_its_head() -> None:
    """Rows are those of the unpacked matrix; a tied head holds the same storages and multiplies by that matrix."""
    weight_VH = random(40, 32, dtype=torch.bfloat16)
    embedding = PackedEmbedding(40, 32, compute=torch.bfloat16, device=CPU)
    embedding.pack(weight_VH)
    head = packed(Int8(), torch.zeros_like(weight_VH))
    tie(head, embedding)
    unpacked_VH = head.unpacked()
    ids = torch.tensor([[3, 0, 39], [3, 3, 7]])
    assert torch.equal(embedding(ids), unpacked_VH[ids])
    assert {tensor.data_ptr() for tensor in head.buffers()} == {tensor.data_ptr() for tensor in embedding.buffers()}
    assert distance(unpacked_VH, weight_VH) < 0.01


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_kernels_run_on_fake_tensors(name: str, tokens: int) -> None:
    """A rehearsal runs the kernels that a real run runs: shapes and dtypes are the real ones."""
    with FakeTensorMode(), torch.no_grad():
        layer = packed(PACKINGS[name], torch.randn(16, 64, dtype=torch.bfloat16))
        layer.rearrange()
        found = layer(torch.randn(tokens, 64, dtype=torch.bfloat16))
    assert (tuple(found.shape), found.dtype) == ((tokens, 16), torch.bfloat16)
