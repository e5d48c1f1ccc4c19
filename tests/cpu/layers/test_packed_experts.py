"""Packed experts against transformers' own, which hold the same weights unpacked."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from brim.layers.packed_experts import DOWN, GATE_UP, PackedExperts, routes
from brim.layers.packing import Int4, Int8, Nf4, Packing, held_bytes

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, PLACES = 6, 64, 96, 40, 2
PACKINGS: dict[str, Packing] = {
    "nf4": Nf4(nested=True), "nf4, plain": Nf4(nested=False), "int8": Int8(), "int4": Int4(group_size=32),
}  # fmt: skip


def library_experts(family: str) -> Any:
    """Random experts that run the library's loop."""
    settings: dict[str, Any] = {"hidden_size": HIDDEN, "experts_implementation": "eager"}
    if family == "mixtral":
        config: Any = MixtralConfig(**settings, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
        experts: nn.Module = MixtralExperts(config)
    else:
        config = Qwen3MoeConfig(**settings, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
        experts = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return experts


def packed(experts: Any, packing: Packing, dtype: torch.dtype = torch.float32) -> PackedExperts:
    layer = PackedExperts(
        num_experts=EXPERTS, hidden=HIDDEN, intermediate=INTERMEDIATE, act_fn=experts.act_fn, packing=packing,
        compute=dtype, device=torch.device("cpu"),
    )  # fmt: skip
    for name, (matrices, *_) in layer.shapes.items():
        fused = getattr(experts, name).detach()
        apart = ((e, m, part) for e, one in enumerate(fused) for m, part in enumerate(one.chunk(matrices)))
        for key, tensor in layer.packed(name, apart).items():
            setattr(layer, key, tensor)
    return layer


def unpack_into(experts: Any, layer: PackedExperts) -> None:
    """Give the library's experts the weights that the packed ones hold."""
    for name, (matrices, *_) in layer.shapes.items():
        whole = [torch.cat([layer.matrix(name, e, m).unpacked() for m in range(matrices)]) for e in range(EXPERTS)]
        getattr(experts, name).data = torch.stack(whole)


def routing(seed: int = 0, *, missed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the experts of each token and their weights; the last `missed` experts get nothing."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    scores[:, EXPERTS - missed :] = -1
    weights, index = scores.topk(PLACES)
    return hidden, index, weights


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_compute_what_the_librarys_compute(family: str, name: str) -> None:
    """Output, and the gradients of hidden states and routing weights, are the library's with the unpacked weights."""
    experts = library_experts(family)
    layer = packed(experts, PACKINGS[name])
    unpack_into(experts, layer)
    results = []
    for module in (experts, layer):
        hidden, index, weights = routing()
        hidden.requires_grad_()
        weights.requires_grad_()
        output = module(hidden, index, weights)
        (output * torch.arange(HIDDEN)).sum().backward()
        results.append((output.detach(), hidden.grad, weights.grad))
    for theirs, ours in zip(*results, strict=True):
        assert theirs is not None
        assert theirs.abs().max() > 0
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", PACKINGS)
def test_each_matrix_is_packed_by_itself(name: str) -> None:
    """What is held of an expert's gate, up and down is, bit by bit, what their own linear layers would hold."""
    experts, packing = library_experts("mixtral"), PACKINGS[name]
    layer = packed(experts, packing)
    for expert in range(EXPERTS):
        gate, up = experts.gate_up_proj[expert].detach().chunk(2)
        for parameter, matrix, weight in ((GATE_UP, 0, gate), (GATE_UP, 1, up), (DOWN, 0, experts.down_proj[expert])):
            held = layer.matrix(parameter, expert, matrix).held
            expected = packing.pack(weight.detach().contiguous())
            assert held.keys() == expected.keys()
            assert all(torch.equal(held[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKINGS)
def test_experts_hold_the_bytes_of_their_matrices(name: str, dtype: torch.dtype) -> None:
    """All buffers together have the packing's own count for each expert's three matrices; there is no parameter."""
    layer = packed(library_experts("mixtral"), PACKINGS[name], dtype)
    up, down = (held_bytes(PACKINGS[name], *shape, dtype) for shape in ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)))
    assert sum(buffer.nbytes for buffer in layer.buffers()) == EXPERTS * (2 * up + down)
    assert not list(layer.parameters())


def test_nothing_of_a_weights_size_is_kept_for_backward() -> None:
    """What autograd keeps beside the packed buffers is N rows of I and H elements, whatever the weights' size."""
    layer = packed(library_experts("mixtral"), PACKINGS["nf4"])
    hidden, index, weights = routing()
    index, weights = index[:1], weights[:1]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        layer(hidden[:1].requires_grad_(), index, weights)
    held = {tensor.untyped_storage().data_ptr() for tensor in layer.buffers()}
    beside = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in held]
    assert beside
    assert max(tensor.numel() for tensor in beside) <= max(INTERMEDIATE, HIDDEN)


def test_every_place_is_routed_once() -> None:
    """Routes are a partition of the (token, place) pairs by expert; pairs past the last expert are left out."""
    _, index, _ = routing()
    index[3, 1] = EXPERTS
    found = {
        (int(t), int(p)): e for e, place, token in routes(index, EXPERTS) for t, p in zip(token, place, strict=True)
    }
    wanted = {(t, p): int(index[t, p]) for t in range(TOKENS) for p in range(PLACES) if index[t, p] < EXPERTS}
    assert found == wanted
