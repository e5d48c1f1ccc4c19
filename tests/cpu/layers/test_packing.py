"""Packed weights against bitsandbytes and compressed-tensors, and the product's gradient against the dense one."""

import pytest
import torch
from bitsandbytes import functional as bnb
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from brim.errors import RecipeError
from brim.layers.packed_linear import PackedLinear
from brim.layers.packing import Int4, Int8, Nf4, Packing, held_bytes
from brim.layers.swap import swap
from brim.numerics.encode import decode, encode_integer
from brim.numerics.formats import FORMATS
from brim.numerics.granularity import PerGroup

PACKINGS: dict[str, Packing] = {
    "nf4": Nf4(nested=True), "nf4, plain": Nf4(nested=False), "int8": Int8(), "int4": Int4(group_size=32),
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


def random_weight(rows: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(name: str, weight_RK: Tensor, bias: Tensor | None = None) -> PackedLinear:
    rows, inputs = weight_RK.shape
    layer = PackedLinear(
        inputs, rows, bias=None if bias is None else nn.Parameter(bias), packing=PACKINGS[name],
        compute=weight_RK.dtype, device=torch.device("cpu"),
    )  # fmt: skip
    layer.pack(weight_RK)
    return layer


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_holds_what_bitsandbytes_holds(dtype: torch.dtype, nested: bool) -> None:
    """Every tensor of bitsandbytes' state for the same weight is held, bit by bit, and nothing beside them."""
    weight_RK = random_weight(96, 192, dtype)  # whole blocks: see Nf4.unpack
    codes, state = bnb.quantize_4bit(weight_RK, quant_type="nf4", compress_statistics=nested)
    wanted = {"weight": codes, "absmax": state.absmax, "code": state.code}
    if nested:
        wanted |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "offset": state.offset}
    held = Nf4(nested=nested).pack(weight_RK)
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[name], wanted[name]) for name in wanted)
    unpacked_RK = Nf4(nested=nested).unpack(held, 96, 192, dtype)
    assert torch.equal(unpacked_RK, bnb.dequantize_4bit(codes, state))


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 9), inputs=st.integers(1, 50).map(lambda half: 2 * half), seed=st.integers(0, 99))
def test_nf4_is_the_grid_times_the_blocks_absmax(rows: int, inputs: int, seed: int) -> None:
    """Decoded here from the published grid, high nibble first, each element is what the operator says."""
    weight_RK = random_weight(rows, inputs, seed=seed)
    packing = Nf4(nested=False)
    held = packing.pack(weight_RK)
    grid = torch.tensor(FORMATS["nf4"].grid)
    nibbles = torch.stack([held["weight"] >> 4, held["weight"] & 15], dim=-1).flatten()[: weight_RK.numel()]
    absmax = held["absmax"].repeat_interleave(64)[: weight_RK.numel()]
    expected_RK = (grid[nibbles.long()] * absmax).view(rows, inputs)
    assert torch.equal(packing.unpack(held, rows, inputs, torch.float32), expected_RK)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_the_reference_encoding(dtype: torch.dtype) -> None:
    """Unpacked, codes and scales are the numerics' own, rounded once."""
    weight_RK = random_weight(24, 40, dtype)
    encoded = encode_integer(weight_RK, scale_dtype=dtype)
    unpacked_RK = Int8().unpack(Int8().pack(weight_RK), 24, 40, dtype)
    assert torch.equal(unpacked_RK, decode(encoded.codes, encoded.scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_is_packed_as_compressed_tensors_packs(dtype: torch.dtype) -> None:
    """compressed-tensors unpacks the same codes, and codes times scales are the unpacked weight."""
    weight_RK = random_weight(24, 96, dtype)
    packing = Int4(group_size=32)
    held = packing.pack(weight_RK)
    encoded = encode_integer(weight_RK, format="int4", granularity=PerGroup(32), scale_dtype=dtype)
    assert torch.equal(unpack_from_int32(held["weight"], 4, torch.Size((24, 96))), encoded.codes)
    expected_RK = decode(encoded.codes, encoded.scale, granularity=PerGroup(32)).to(dtype)
    assert torch.equal(packing.unpack(held, 24, 96, dtype), expected_RK)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PACKINGS)
def test_what_is_held_has_the_layout(name: str, dtype: torch.dtype) -> None:
    """A layout's names, shapes and dtypes are those of a packed weight, and its bytes theirs."""
    rows, inputs = 36, 96
    held = PACKINGS[name].pack(random_weight(rows, inputs, dtype))
    assert PACKINGS[name].layout(rows, inputs, dtype) == {
        key: (tuple(tensor.shape), tensor.dtype) for key, tensor in held.items()
    }
    assert held_bytes(PACKINGS[name], rows, inputs, dtype) == sum(tensor.nbytes for tensor in held.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PACKINGS)
def test_the_product_is_that_of_the_unpacked_weight(name: str, dtype: torch.dtype) -> None:
    """Result, input gradient and bias gradient are those of a dense linear with the unpacked weight."""
    layer = packed(name, random_weight(12, 32, dtype), bias=random_weight(1, 12, dtype, seed=1)[0])
    ours = random_weight(6, 32, dtype, seed=2).view(2, 3, 32).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    assert layer.bias is not None
    bias = layer.bias.detach().clone().requires_grad_()
    result, expected = layer(ours), nn.functional.linear(theirs, layer.unpacked(), bias)
    assert torch.equal(result, expected)
    upstream = random_weight(6, 12, dtype, seed=3).view(2, 3, 12)
    result.backward(upstream)
    expected.backward(upstream)
    assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)
    assert layer.bias.grad is not None and bias.grad is not None
    assert torch.allclose(layer.bias.grad.float(), bias.grad.float(), rtol=1e-2)


@pytest.mark.parametrize("name", PACKINGS)
def test_nothing_of_the_weights_size_waits_for_backward(name: str) -> None:
    """Beside the packed weight, which is there anyway, a product keeps nothing for its backward: neither input nor
    unpacked weight."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    layer = packed(name, random_weight(12, 32))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(random_weight(3, 32).requires_grad_())
    held = {tensor.untyped_storage().data_ptr() for tensor in layer.buffers()}
    assert [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in held] == []


@pytest.mark.parametrize("name", PACKINGS)
def test_fake_tensors_are_packed_and_multiplied(name: str) -> None:
    """Built, packed, run and differentiated without data, the layer has the sizes that it has with data."""
    real = packed(name, random_weight(12, 32))
    with FakeTensorMode():
        fake = packed(name, torch.randn(12, 32))
        x = torch.randn(3, 32, requires_grad=True)
        fake(x).sum().backward()
    assert {key: tensor.shape for key, tensor in fake.held.items()} == {k: t.shape for k, t in real.held.items()}
    assert x.grad is not None and x.grad.shape == (3, 32)


def test_groups_that_do_not_fill_a_row_are_refused() -> None:
    """The refusal says the size that does."""
    with pytest.raises(RecipeError, match=r"nearest: precision\.group_size = 64"):
        Int4(group_size=128).layout(8, 576, torch.bfloat16)


def test_a_module_in_two_places_is_replaced_once() -> None:
    """Ties survive the walk; what does not match is untouched."""
    shared, norm = nn.Linear(2, 2), nn.LayerNorm(2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, norm)})
    made = swap(model, match=lambda _, module: isinstance(module, nn.Linear), make=lambda _: nn.Identity())
    tied = model["b"]
    assert made == 1 and isinstance(tied, nn.Sequential)
    assert isinstance(model["a"], nn.Identity) and tied[0] is model["a"] and tied[1] is norm
