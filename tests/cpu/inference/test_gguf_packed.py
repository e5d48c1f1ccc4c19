"""GGUF files whose Q8_0 and Q4_0 matrices stay packed: the file's codes and scales, and its reader's logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from brim.checkpoints.convert import quantize
from brim.cli import main
from brim.inference import load, locate, resident_bytes
from brim.layers.packed_embedding import PackedEmbedding
from brim.layers.packed_linear import PackedLinear
from brim.layers.packing import Int4, Int8

VOCAB = 67
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "heads": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=False, head_dim=32),
    "qwen2": lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=64, tie_word_embeddings=False),
    "gemma3": lambda: Gemma3TextConfig(**_SHAPE, head_dim=32),
}
TOKENS = torch.arange(16).view(2, 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(family: str, to: Any, place: Path) -> Path:
    """A GGUF file of a random model, with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(place / "source")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 3, special_tokens=["<end>"], show_progress=False)
    inner.train_from_iterator(["Brim fills the memory that you have to the brim and never over it."] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(place / "source")
    quantize(place / "source", place / "output", to=to)
    return place / "output" / "model.gguf"


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model.eval()(TOKENS).logits
    return result


@pytest.mark.parametrize(
    ("family", "to"),
    [("llama", "q8_0"), ("llama", "q4_0"), ("heads", "q4_0"), ("qwen2", "q8_0"), ("qwen3", "q4_0"), ("gemma3", "q8_0")],
)
def test_blocks_stay_and_mean_what_their_reader_says(family: str, to: str, tmp_path: Path) -> None:
    """Every linear layer holds the file's codes by groups of 32; the logits are those of transformers, which decodes
    the file to FP32."""
    path = written(family, to, tmp_path)
    model = load(locate(str(path))).model
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    wanted = Int4(group_size=32) if to == "q4_0" else Int8(group_size=32)
    assert [layer.packing for layer in layers[:14]] == [wanted] * 14
    # Gemma's embedding multiplies what it looks up, so it stays plain, and the head with it.
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) == (family != "gemma3")
    config = AutoConfig.from_pretrained(locate(str(path)))  # where their reading of Gemma's metadata guesses otherwise
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    if family != "gemma3":
        assert resident_bytes(model) < 0.36 * resident_bytes(theirs)


def test_the_weights_are_ggufs(tmp_path: Path) -> None:
    """Unpacked, a matrix is gguf-py's decoding of the file, bit by bit, its heads' rows where transformers has them."""
    path = written("llama", "q8_0", tmp_path)
    model = load(locate(str(path))).model
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, own in (
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj"),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj"),
    ):
        expected = torch.from_numpy(dequantize(tensors[name].data, GGMLQuantizationType.Q8_0))
        assert torch.equal(model.get_submodule(own).unpacked(), expected)
    queries = torch.from_numpy(dequantize(tensors["blk.0.attn_q.weight"].data, GGMLQuantizationType.Q8_0))
    halves = queries.view(4, 8, 2, 64).transpose(1, 2).reshape(64, 64)
    assert torch.equal(model.get_submodule("model.layers.0.self_attn.q_proj").unpacked(), halves)


def test_the_verbs_take_it_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`generate` says the packed model's bytes; a second run finds what the first prepared."""
    path, said = written("llama", "q4_0", tmp_path), []
    for _ in range(2):
        assert main(["generate", str(path), "brim", "--max-tokens", "3", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    plain = resident_bytes(load(tmp_path / "source").model)
    assert said[0]["resident_bytes"] == said[1]["resident_bytes"] < 0.3 * plain
    assert said[0]["text"] == said[1]["text"]
