"""One token by the short way, against the same layers without it."""

from itertools import permutations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from brim.layers.one_token import prepare_one_token
from brim.layers.packed_linear import PackedLinear
from brim.layers.packing import Int4, Int8, Packing

NAMES = ("q_proj", "k_proj", "v_proj")
PACKINGS = (Int8(), Int8(), Int8(group_size=8), Int8(rounds_inputs=True), Int4(group_size=8), Int4(group_size=32))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def attention(
    rows: tuple[int, ...] = (32, 16, 16), inputs: int = 32, *, packing: Packing | None = None, bias: bool = False
) -> nn.Module:
    """Its three layers, ready for one token."""
    model = nn.Module()
    for seed, (name, outputs) in enumerate(zip(NAMES, rows, strict=True)):
        layer = PackedLinear(
            inputs, outputs, bias=nn.Parameter(random(outputs, seed=9 + seed)) if bias else None,
            packing=packing or Int8(), compute=torch.bfloat16, device=torch.device("cpu"),
        )  # fmt: skip
        layer.pack(random(outputs, inputs, seed=seed))
        layer.rearrange()
        setattr(model, name, layer)
    prepare_one_token(model)
    return model


def layers_of(model: nn.Module) -> list[PackedLinear]:
    return [layer for layer in model.children() if isinstance(layer, PackedLinear)]


def is_product(found: Tensor, input: Tensor, layer: PackedLinear) -> bool:
    expected = F.linear(input.float(), layer.unpacked().float(), None if layer.bias is None else layer.bias.float())
    return found.shape == expected.shape and bool((found.float() - expected).norm() < 0.01 * expected.norm())


@settings(deadline=None, max_examples=40)
@given(
    rows=st.tuples(*[st.sampled_from([1, 16, 33])] * 3) | st.tuples(*[st.sampled_from([64, 128])] * 3),
    inputs=st.sampled_from([16, 32, 64, 40, 128]),
    packing=st.sampled_from(PACKINGS),
    bias=st.booleans(),
    order=st.sampled_from(list(permutations(range(3)))),
    shape=st.sampled_from([(1,), (1, 1), (2, 1), (1, 3)]),
    inference=st.booleans(),
)
def test_whoever_is_asked_in_whatever_order(
    rows: tuple[int, int, int], inputs: int, packing: Packing, bias: bool, order: tuple[int, ...],
    shape: tuple[int, ...], inference: bool,
) -> None:  # fmt: skip
    """Each layer's product is its own weight's, for any packing, order and number of tokens; asked twice, too."""
    assume(packing != Int4(group_size=32) or inputs % 32 == 0)
    layers = layers_of(attention(rows, inputs, packing=packing, bias=bias))
    with torch.inference_mode(inference), torch.no_grad():
        input = random(*shape, inputs, seed=5)
        allowed = 3 if packing == Int8(rounds_inputs=True) else 1
        for place in (*order, *order):
            found = layers[place](input)
            expected = F.linear(input.float(), layers[place].unpacked().float())
            expected = expected if layers[place].bias is None else expected + layers[place].bias.float()
            assert found.shape == expected.shape and found.dtype == torch.bfloat16
            # a sum that cancels has a large relative error in BF16, whoever adds it up
            size = float(input.float().norm() * layers[place].unpacked().float().norm() + expected.norm())
            assert float((found.float() - expected).norm()) < 0.01 * allowed * size


def test_a_part_is_of_the_very_input_that_is_asked_for() -> None:
    """Another tensor, the same one changed since, and another of the same numbers' place in memory: made anew."""
    queries, keys, values = layers_of(attention())
    with torch.no_grad():
        input = random(1, 32)
        queries(input)
        other = random(1, 32, seed=3)
        assert is_product(keys(other), other, keys)
        input.mul_(-3)
        assert is_product(values(input), input, values)
        queries(input)
        del input
        for seed in range(20):
            again = random(1, 32, seed=seed)
            assert is_product(keys(again), again, keys)


def test_layers_that_read_one_input_multiply_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers, one call of the kernel; of several tokens, one each, and whole rows in memory."""
    calls: list[int] = []
    kernel = torch._weight_int8pack_mm

    def counting(input_TK: Tensor, weight_RK: Tensor, scale_R: Tensor) -> Tensor:
        calls.append(len(weight_RK))
        return kernel(input_TK, weight_RK, scale_R)

    layers = layers_of(attention())
    monkeypatch.setattr(torch, "_weight_int8pack_mm", counting)
    with torch.no_grad():
        input = random(1, 1, 32)
        found = [layer(input) for layer in layers]
        assert calls == [64] and all(part.is_contiguous() for part in found)
        several = random(2, 1, 32)
        assert all(layer(several).is_contiguous() for layer in layers)


def test_names_and_bytes_stay_as_they_were() -> None:
    """Joined layers hold and save what they held, in no more bytes than the weights themselves have."""
    model = attention()
    assert all(layer.packing == Int8() for layer in layers_of(model))
    alone = {name: PackedLinear(32, rows, bias=None, packing=Int8(), compute=torch.bfloat16, device=torch.device("cpu"))
             for name, rows in zip(NAMES, (32, 16, 16), strict=True)}  # fmt: skip
    expected = {f"{name}.{key}": tensor.shape for name, layer in alone.items() for key, tensor in layer.held.items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected
    storages = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in model.buffers()}
    assert sum(storages.values()) == 64 * 32 + 64 * 2
    for seed, layer in enumerate(layers_of(model)):
        codes = Int8().pack(random(layer.out_features, 32, seed=seed))
        assert all(torch.equal(layer.held[name], codes[name]) for name in codes)


def test_moved_or_repacked_layers_are_themselves_again() -> None:
    """What the short way reads is left behind: a layer with another weight multiplies by that one."""
    queries, keys, _ = layers_of(attention())
    queries.pack(random(32, 32, seed=7))
    keys.to("cpu")._apply(lambda tensor: tensor.clone())
    keys.weight.zero_()
    with torch.no_grad():
        input = random(1, 32)
        assert is_product(queries(input), input, queries)
        assert not keys(input).any()


def test_gradients_pass_as_before() -> None:
    """Where a gradient is asked for, the product is differentiable."""
    queries, keys, values = layers_of(attention())
    input = random(1, 32).requires_grad_()
    (queries(input).sum() + keys(input).sum() + values(input).sum()).backward()
    expected = torch.cat([layer.unpacked().float() for layer in (queries, keys, values)]).sum(0)
    assert input.grad is not None and torch.allclose(input.grad.float(), expected, rtol=0.02, atol=0.1)
