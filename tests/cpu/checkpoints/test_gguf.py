"""GGUF: blocks as gguf-py quantizes them, files as transformers reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from gguf.quants import quantize as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from brim.checkpoints import stream
from brim.checkpoints.convert import quantize
from brim.checkpoints.layouts.gguf_vocabulary import cut_name
from brim.checkpoints.targets import Target
from brim.errors import ModelFileError, UsageError
from brim.models import describe
from brim.models.gguf_header import read_gguf_header
from brim.numerics.ggml_blocks import decode_blocks, encode_blocks, pack_blocks, unpack_blocks

Maker = Callable[..., Path]
TYPES = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
VOCAB = 67
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "heads": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=False, head_dim=32, rope_theta=5e5),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=128),
    "gemma3": lambda: Gemma3TextConfig(**_SHAPE, head_dim=32),
}


def made(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return directory


def packed(values: Tensor, format: str) -> Any:
    return pack_blocks(encode_blocks(values, format=format), format=format).numpy()


@pytest.mark.parametrize("format", TYPES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_blocks_are_ggufs(format: str, data: st.DataObject) -> None:
    """Q8_0 and Q4_0 are gguf-py's own bytes: of any sizes, of halves, of zeros, of two largest with unlike signs."""
    numbers = st.one_of(
        st.integers(-254, 254).map(lambda number: number / 2),
        st.floats(-(2.0**18), 2.0**18, width=32, allow_subnormal=False),
        st.floats(-(2.0**-10), 2.0**-10, width=32, allow_subnormal=False),
        st.just(0.0),
    )
    values = torch.tensor(data.draw(st.lists(numbers, min_size=64, max_size=64)), dtype=torch.float32).view(2, 32)
    values[0, 0] = data.draw(st.sampled_from([127.0, -127.0, 0.0, float(values[0, 1]), -float(values[0, 1])]))
    largest = values.abs().amax(dim=-1)
    if bool(((largest == 0) | (largest > 1e-35)).all()):  # below, gguf-py divides by what is no longer a number
        assert np.array_equal(packed(values, format), reference(values.numpy(), TYPES[format]).reshape(2, -1))


@pytest.mark.parametrize("format", TYPES)
def test_many_blocks_are_ggufs(format: str) -> None:
    """So are a million normal values of each source format, and decoding gives what gguf-py's gives."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = (torch.randn(512, 2048, generator=torch.Generator().manual_seed(1)) * 0.03).to(dtype)
        blocks = packed(values, format)
        wide = values.float().numpy()
        assert np.array_equal(blocks.reshape(-1), reference(wide, TYPES[format]).reshape(-1))
        decoded = decode_blocks(unpack_blocks(torch.from_numpy(blocks), format=format))
        assert np.array_equal(
            decoded.numpy().reshape(wide.shape), dequantize(blocks, TYPES[format]).reshape(wide.shape)
        )


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model.eval()(torch.arange(16).view(2, 8)).logits


def from_gguf(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file="model.gguf", output_loading_info=True, dtype=dtype
    )
    assert not any(loading.values())
    return model


@pytest.mark.parametrize(
    ("family", "to"), [*((name, "q4_0") for name in CONFIGS), ("heads", "fp32"), ("gemma3", "q8_0")]
)
def test_transformers_has_the_logits_of_the_decoded_weights(family: str, to: Target, tmp_path: Path) -> None:
    """A model loaded from the file has, bit by bit, the logits of the source model with each matrix encoded and decoded
    by gguf-py; of an FP32 file, the source's own."""
    source, output = made(family, tmp_path / family), tmp_path / "output"
    report = quantize(source, output, to=to, layout="gguf")
    assert {path.name for path in output.iterdir()} == {"model.gguf", "quantization_report.json"}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and to != "fp32":
            finer = "q8_0" if "embed_tokens" in name or "lm_head" in name else to
            blocks = reference(parameter.detach().numpy(), TYPES[finer])
            parameter.data = torch.from_numpy(dequantize(blocks, TYPES[finer])).view(parameter.shape)
    loaded = from_gguf(output)
    tied = loaded.config.tie_word_embeddings
    assert tied == model.config.tie_word_embeddings
    assert torch.equal(logits(loaded), logits(model))
    assert {tensor.format for tensor in report.tensors} <= {to, "q8_0", "fp32"}
    assert describe(str(output / "model.gguf")).num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_file_is_the_one_that_ggufs_writer_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    """gguf-py's reader finds every tensor, aligned, in a file as long as gguf-py's writer would make it, with the
    bytes that its quantizer gives; a resumed run ends with the same file."""
    source, output = made("qwen2", tmp_path / "source", dtype), tmp_path / "output"
    quantize(source, output, to="q8_0")
    reader = gguf.GGUFReader(output / "model.gguf")
    before = load_file(source / "model.safetensors")
    assert len(reader.tensors) == len(before)
    found = {tensor.name: tensor for tensor in reader.tensors}
    down = before["model.layers.1.mlp.down_proj.weight"].float().numpy()
    assert np.array_equal(found["blk.1.ffn_down.weight"].data, reference(down, TYPES["q8_0"]))
    norm = before["model.layers.1.input_layernorm.weight"].float().numpy()
    assert np.array_equal(found["blk.1.attn_norm.weight"].data, norm)
    last = max(reader.tensors, key=lambda tensor: tensor.data_offset)
    end = last.data_offset + last.n_bytes
    assert (output / "model.gguf").stat().st_size == -(-end // 32) * 32


def test_a_killed_run_ends_with_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in its middle leaves no file, and going on gives the undisturbed one's, byte by byte."""
    source, calls = made("llama", tmp_path / "source"), iter(range(100))
    convert = stream._convert

    def failing(*arguments: Any) -> Any:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return convert(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "FLUSH_S", -1.0)
        patch.setattr(stream, "_convert", failing)
        with pytest.raises(BaseException, match="interrupted"):
            quantize(source, tmp_path / "output", to="q4_0", memory_bytes=2**26)
    assert not (tmp_path / "output").exists()
    quantize(source, tmp_path / "output", to="q4_0", resume=True)
    quantize(source, tmp_path / "undisturbed", to="q4_0")
    assert (tmp_path / "output" / "model.gguf").read_bytes() == (tmp_path / "undisturbed" / "model.gguf").read_bytes()


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    """A tokenizer made of the file's metadata gives the source's tokens, and ends texts as it does."""
    source = made("llama", tmp_path / "llama")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 3, special_tokens=["<end>"], show_progress=False)
    inner.train_from_iterator(["Brim fills the memory that you have to the brim and never over it."] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(source)
    quantize(source, tmp_path / "output", to="q8_0")
    ours = AutoTokenizer.from_pretrained(tmp_path / "output", gguf_file="model.gguf")
    theirs = AutoTokenizer.from_pretrained(source)
    for text in ("Brim fills the memory you have.", "the brim <end>", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.eos_token == theirs.eos_token


def test_words_are_cut_as_llama_cpp_names_it() -> None:
    """The known ways of cutting have llama.cpp's names; others have none."""
    digits = {"type": "Digits", "individual_digits": True}
    level = {"type": "ByteLevel", "use_regex": True}
    assert cut_name(level) == "gpt-2"
    assert cut_name({"type": "Sequence", "pretokenizers": [digits, level]}) == "smollm"
    assert cut_name({"type": "Whitespace"}) is None
    assert cut_name({}) is None


def edited(source: Path, **facts: Any) -> Path:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | facts))
    return source


def test_what_a_reader_would_get_wrong_is_refused(tiny: Maker, tmp_path: Path) -> None:
    """Families and facts that transformers does not read back, rows that other layouts are for, scales that FP16 does
    not hold: each is refused with what to do, and nothing is written."""
    output = tmp_path / "output"
    with pytest.raises(UsageError, match=r"gpt2, which is not written as GGUF .*use --to int8"):
        quantize(tiny("gpt2"), output, to="q8_0")
    with pytest.raises(UsageError, match="has biases in its linear layers"):
        quantize(tiny("untied"), output, to="q8_0")
    with pytest.raises(UsageError, match=r"stretches its positions \(yarn\)"):
        quantize(edited(tiny("llama"), rope_scaling={"rope_type": "yarn", "factor": 2.0}), output, to="q8_0")
    with pytest.raises(UsageError, match=r"layout plain does not hold q8_0; it holds fp32, fp16, bf16"):
        quantize(tiny("llama"), output, to="q8_0", layout="plain")
    source = made("llama", tmp_path / "large")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e7
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFileError, match="32 values are past the largest of Q8_0"):
        quantize(source, output, to="q8_0")
    assert not output.exists()


def test_rows_that_are_no_blocks_stay_fp16(tiny: Maker, tmp_path: Path) -> None:
    """A matrix whose rows do not divide into blocks of 32 becomes FP16, as llama.cpp's own quantizer has it."""
    quantize(tiny("llama"), tmp_path / "output", to="q8_0")
    header = read_gguf_header(tmp_path / "output" / "model.gguf")
    kinds = {entry.spec.name: entry.spec.dtype for entry in header.tensors}
    assert kinds["blk.0.ffn_down.weight"] == "fp16"  # rows of 48
    assert kinds["blk.0.ffn_up.weight"] == "q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "fp32"
