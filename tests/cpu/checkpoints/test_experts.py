"""Mixtures of experts: each expert's matrices are quantized as if they were a linear layer's, routers stay."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from brim.checkpoints.convert import quantize
from brim.checkpoints.mixture import parse_mixture
from brim.checkpoints.targets import Target
from brim.errors import UsageError
from brim.numerics.granularity import PerGroup
from brim.numerics.mx_blocks import Blocks, decode_blocks, unpack_nibbles

_SHAPE: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_SMALL: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**_SHAPE, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_SHAPE, **_SMALL, num_experts=4, head_dim=8),
    "olmoe": lambda: OlmoeConfig(**_SHAPE, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**_SHAPE, "num_key_value_heads": 4}, **_SMALL, n_routed_experts=4, n_group=2, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    ),
}  # fmt: skip
PARTS = (
    {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
)
EXPERT = re.compile(r"\.experts\.\d+\.")


def random_model(family: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def merged(directory: Path) -> Path:
    """The model's files with experts merged, as transformers 5 holds them."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, directory / "model.safetensors")
    return directory


def decoded(after: dict[str, Tensor], name: str, to: Target) -> Tensor:
    """What the output's bytes say that this weight is."""
    if to == "fp8":
        return after[name].float() * after[f"{name}_scale"].float()
    words, scale = after[f"{name}_packed"], after[f"{name}_scale"]
    if to == "mxfp4":
        return decode_blocks(Blocks(unpack_nibbles(words), scale, 0))
    shape = torch.Size(after[f"{name}_shape"].tolist())
    codes = unpack_from_int32(words, {"int4": 4, "int8": 8}[to], shape)
    return codes * scale.repeat_interleave(shape[1] // scale.shape[1], dim=1)


@pytest.mark.parametrize(
    ("family", "to", "in_one"),
    [
        ("mixtral", "int4", True), ("qwen3_moe", "fp8", True), ("olmoe", "mxfp4", False), ("deepseek_v3", "int8", True),
    ],
)  # fmt: skip
def test_transformers_sees_each_expert_quantized(family: str, to: Target, in_one: bool, tmp_path: Path) -> None:
    """Experts one by one in the file or merged there become the same: each matrix of each expert within its format's
    error of the source, routers untouched and named among what is left alone; transformers holds, and gives
    the logits of, what the bytes decode to."""
    source, output = tmp_path / family, tmp_path / "output"
    random_model(family).save_pretrained(source)
    apart = load_file(source / "model.safetensors")
    if in_one:
        merged(source)
    settings: dict[str, Any] = {"granularity": PerGroup(16)} if to == "int4" else {}
    report = quantize(source, output, to=to, **settings)
    after = load_file(output / "model.safetensors")
    experts = [tensor for tensor in report.converted if EXPERT.search(tensor.name)]
    assert len(experts) == (2 if family != "deepseek_v3" else 1) * 4 * 3
    assert all(
        tensor.sqnr_db is not None and tensor.sqnr_db > {"int8": 38, "fp8": 28}.get(to, 15) for tensor in experts
    )
    plain = AutoModelForCausalLM.from_pretrained(source).eval()
    state = plain.state_dict()
    weights = {tensor.name: decoded(after, tensor.name, to) for tensor in report.converted}
    for name, weight in weights.items():
        if not EXPERT.search(name):
            assert float((weight - state[name]).norm() / state[name].norm()) < 0.2
            state[name].copy_(weight)
    for name, tensor in state.items():
        if ".experts." in name and tensor.dim() == 3:
            module, _, kind = name.rpartition(".")
            parts = PARTS[family == "mixtral"][kind]
            for number, expert in enumerate(tensor):
                inner = module if in_one or family != "mixtral" else module.replace(".mlp.", ".block_sparse_moe.")
                found = torch.cat([weights[f"{inner}.{number}.{part}.weight"] for part in parts])
                assert float((found - expert).norm() / expert.norm()) < 0.2
                expert.copy_(found)
    routers = [n for n in apart if re.search(r"\.(mlp|block_sparse_moe)\.gate\.weight", n)]
    assert len(routers) == len(experts) // 12
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto").eval()
    ignored = json.loads((output / "config.json").read_text())["quantization_config"]["ignore"]
    for router in routers:
        kept = router if router in after else router.replace(".block_sparse_moe.", ".mlp.")
        assert torch.equal(after[kept], apart[router]) and kept.removesuffix(".weight") in ignored
    tokens = torch.arange(16).reshape(2, 8)
    with torch.inference_mode():
        # transformers holds MXFP4's experts, decoded without loss, in BF16, and so multiplies in it.
        assert torch.allclose(loaded(tokens).logits, plain(tokens).logits, atol=2e-3 if to == "mxfp4" else 1e-5)
    held = loaded.state_dict()
    assert all(torch.allclose(held[name].float(), tensor, rtol=1e-6, atol=0) for name, tensor in state.items())


def test_what_readers_of_experts_lack_is_refused(tmp_path: Path) -> None:
    """Zero points, experts kept beside quantized ones, two formats, and layouts without a form for experts: each is
    refused rather than written in vain; other linear layers may be kept."""
    source, output = tmp_path / "model", tmp_path / "output"
    random_model("mixtral").save_pretrained(source)
    for settings in (
        {"symmetric": False},
        {"mixture": parse_mixture(keep=["*.experts.1.w1.weight"], formats=[])},
        {"mixture": parse_mixture(keep=[], formats=["*.q_proj.weight=int4"])},
    ):
        with pytest.raises(UsageError, match="reads all experts in one format"):
            quantize(source, output, to="int8", **settings)
    for layout in ("torchao", "bitsandbytes"):
        with pytest.raises(UsageError, match="use --layout compressed-tensors"):
            quantize(source, output, to="int8", layout=layout)
    mixture = parse_mixture(keep=["*.self_attn.*"], formats=[])
    report = quantize(source, output, to="int8", mixture=mixture)
    assert len(report.converted) == 2 * 4 * 3 and AutoModelForCausalLM.from_pretrained(output) is not None
