"""litgpt's decoder, adapters and products, as a library variant."""

import pytest
import torch
from torch import Tensor, nn

from brim.errors import RecipeError
from brim.layers.packed_linear import PackedLinear
from brim.layers.packing import Nf4
from brim.models import ModelSpec
from brim.models.skeleton import skeleton
from brim.recipe import Lora, Recipe
from brim.training.build import build
from brim.training.litgpt import Attention, Litgpt
from brim.training.litgpt_lora import AdaptedQKV, add_litgpt_lora

SHAPES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
    "max_position_embeddings": 32,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}


def spec_of(model_type: str, **more: object) -> ModelSpec:
    config = {"model_type": model_type, **SHAPES, **more}
    return ModelSpec(name="tiny", kind="directory", config=config, num_parameters=1, tied_head=False)


def litgpt_of(spec: ModelSpec) -> Litgpt:
    torch.manual_seed(0)
    model = skeleton(spec, dtype="fp32", attention="sdpa", written=Litgpt)
    assert isinstance(model, Litgpt)
    return model.eval()


def put(linear: nn.Module, weight: Tensor) -> None:
    linear.load_state_dict({"weight": weight})


def interleaved(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows of q, k and v as litgpt orders them: of each group its queries, its keys, its values."""
    groups = attention.groups
    return torch.cat([part.unflatten(0, (groups, -1)) for part in (q, k, v)], dim=1).flatten(0, 1)


def test_it_computes_what_transformers_computes() -> None:
    """With the weights of a Llama of grouped heads, logits equal those of transformers' own class."""
    spec = spec_of("llama", **GROUPED)
    ours, theirs = litgpt_of(spec), skeleton(spec, dtype="fp32", attention="sdpa").eval()
    weights = theirs.state_dict()
    with torch.no_grad():
        for index, block in enumerate(ours.blocks):
            own = {name.removeprefix(f"model.layers.{index}."): weights[name] for name in weights}
            q, k, v = (own[f"self_attn.{part}_proj.weight"] for part in "qkv")
            put(block.attn.attn, interleaved(block.attn, q, k, v))
            put(block.attn.proj, own["self_attn.o_proj.weight"])
            for name, theirs_name in (("fc_1", "gate"), ("fc_2", "up"), ("proj", "down")):
                put(getattr(block.mlp, name), own[f"mlp.{theirs_name}_proj.weight"])
        put(ours.wte, weights["model.embed_tokens.weight"])
        put(ours.lm_head, weights["lm_head.weight"])
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_one_adapter_of_q_k_and_v_changes_the_adapted_parts_alone() -> None:
    """With adapters on queries and values, keys are what they were, and the rest is moved by B times A."""
    model = litgpt_of(spec_of("llama", **GROUPED))
    attention = next(model.blocks).attn
    plain = attention.attn
    adapter = AdaptedQKV(attention, Lora(rank=3, alpha=6), (True, False, True))
    nn.init.normal_(adapter.lora_B)
    x = torch.randn(2, 5, 32)
    heads = (adapter(x) - plain(x)).unflatten(-1, (2, 4, 8))  # each group: two queries, a key, a value
    assert heads[..., 2, :].abs().max() == 0
    a_q, a_v = adapter.lora_A.chunk(2)
    b_q, b_v = adapter.lora_B.split((32, 16))
    torch.testing.assert_close(heads[..., :2, :].flatten(-3), x @ a_q.T @ b_q.T * 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heads[..., 3, :].flatten(-2), x @ a_v.T @ b_v.T * 2, rtol=1e-4, atol=1e-5)


def test_a_held_product_keeps_its_input_as_long_as_the_graph() -> None:
    """bitsandbytes 0.42's product has the gradient of the plain one, and its input outlives backward with the graph."""
    torch.manual_seed(0)
    linear = PackedLinear(
        64, 64, bias=None, packing=Nf4(nested=False), compute=torch.float32, device=torch.device("cpu")
    )
    linear.pack(torch.randn(64, 64))
    x = torch.randn(3, 64, requires_grad=True)
    found = []
    for linear.holds_input in (False, True):
        middle = x * 2
        out = linear(middle)
        out.sum().backward()
        assert x.grad is not None
        found.append(x.grad.clone())
        x.grad = None
        assert (getattr(out.grad_fn, "input", None) is middle) == linear.holds_input
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-2)  # by way of FP16


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma", "gemma2", "gpt_neox", "falcon", "phi"])
def test_every_family_has_gradients_on_its_adapters_alone(family: str) -> None:
    """Backward of a model with adapters everywhere, the head too, reaches each B and no frozen weight."""
    sizes = {} if family in ("gpt_neox", "falcon") else GROUPED | ({"head_dim": 8} if "gemma" in family else {})
    model = litgpt_of(spec_of(family, pad_token_id=0, **sizes))
    add_litgpt_lora(model, Lora(rank=2, targets=("query", "key", "value", "projection", "mlp", "head")))
    model(torch.arange(10)[None]).logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def test_unknown_families_and_targets_are_refused() -> None:
    """Each with what is known."""
    recipe = Recipe(model="tiny", seq_len=8).with_settings(["library.model=litgpt"])
    with pytest.raises(RecipeError, match="gpt2"):
        build(
            recipe,
            ModelSpec(name="t", kind="directory", config={"model_type": "gpt2"}, num_parameters=1, tied_head=True),
        )
    with pytest.raises(RecipeError, match="q_proj"):
        add_litgpt_lora(litgpt_of(spec_of("llama")), Lora(targets=("q_proj",)))
