"""`library.rotary`, `.heads` and `.checkpoints`: the same numbers as without, and what lives meanwhile."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from brim.layers import fused
from brim.memory.lifetimes import LifetimeMeter
from brim.training.attention_blocks import alter_attention, multiply_angles
from brim.training.checkpointing import checkpoint_blocks

ROWS, TOKENS, HEADS, KV_HEADS, HEAD = 2, 16, 4, 2, 8


def small_llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HEADS * HEAD, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=40, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).train()


def gradients(model: LlamaForCausalLM) -> list[Tensor]:
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 40
    model(ids).logits.square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_turning_in_place_is_transformers_rotation() -> None:
    """What lies in a tensor after `turn` is what `apply_rotary_pos_emb` returns; turned back, it is as before."""
    query = torch.randn(ROWS, HEADS, TOKENS, HEAD, dtype=torch.float64)
    angles = torch.randn(TOKENS, HEAD // 2, dtype=torch.float64).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(query, query, cos[None], sin[None])
    turned = query.clone()
    fused.turn(turned, cos, sin)
    assert torch.equal(turned, expected)
    fused.turn(turned, cos, -sin)
    assert torch.allclose(turned, query)


@pytest.mark.parametrize(("in_place", "repeated"), [(True, False), (False, True), (True, True)])
def test_altered_attention_learns_the_same(in_place: bool, repeated: bool) -> None:
    """Every gradient is that of transformers' own attention, with checkpoints of either kind, too."""
    plain = small_llama()
    altered, checkpointed = copy.deepcopy(plain), copy.deepcopy(plain)
    alter_attention(altered, in_place=in_place, repeated=repeated)
    alter_attention(checkpointed, in_place=in_place, repeated=repeated)
    checkpoint_blocks(checkpointed, "full", reentrant=True)
    expected = gradients(plain)
    for model in (altered, checkpointed):
        found = gradients(model)
        assert len(found) == len(expected)
        assert all(torch.allclose(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_the_product_of_angles_changes_no_number() -> None:
    """With transformers 4's product before them the angles are as they were, to the bit."""
    plain = small_llama()
    altered = copy.deepcopy(plain)
    multiply_angles(altered)
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 40
    assert torch.equal(plain(ids).logits, altered(ids).logits)


def test_repeated_heads_live_until_the_output_is_made() -> None:
    """When the output's product runs, a key and a value for each query head are alive: beyond grouped heads, as many
    bytes more as there are heads more."""

    def alive_at_output(repeated: bool) -> int:
        model = small_llama(torch.float32)
        alter_attention(model, in_place=False, repeated=repeated)
        seen: list[int] = []
        with torch.no_grad(), LifetimeMeter() as meter:
            model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
                lambda *_: seen.append(meter.trace.live_bytes)
            )
            model(torch.zeros(ROWS, TOKENS, dtype=torch.long))
        return seen[0]

    state = 4 * ROWS * TOKENS * HEAD
    assert alive_at_output(True) - alive_at_output(False) == 2 * HEADS * state


def test_a_reentrant_block_holds_its_output_in_backward() -> None:
    """The moment of most memory in a block's backward has the block's output more than without reentrance."""

    def highest(reentrant: bool) -> int:
        model = small_llama(torch.float32).requires_grad_(False)
        for layer in model.model.layers:
            layer.mlp.up_proj.requires_grad_(True)
        checkpoint_blocks(model, "full", reentrant=reentrant)
        ids = torch.zeros(ROWS, 8 * TOKENS, dtype=torch.long)
        with LifetimeMeter() as meter:
            loss = model.model(ids).last_hidden_state.sum()
            meter.trace.peak_bytes = 0
            loss.backward()
        return meter.trace.peak_bytes

    assert highest(True) - highest(False) == 4 * ROWS * 8 * TOKENS * HEADS * HEAD
