"""bitsandbytes' layouts: what bitsandbytes itself writes, and what transformers makes of ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_dequant
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from brim.checkpoints import stream
from brim.checkpoints.convert import quantize
from brim.errors import ModelFileError, UsageError
from brim.numerics.formats import NF4_GRID
from brim.numerics.granularity import PerGroup

Maker = Callable[..., Path]
VOCAB = 67
CONFIGS = {
    "llama": lambda: LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "t5": lambda: T5Config(
        vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0
    ),
}  # fmt: skip


def kind(family: str) -> Any:
    return AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM


def made(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(family).from_config(CONFIGS[family](), dtype=dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return directory


def logits(model: Any) -> Tensor:
    tokens = torch.arange(16).reshape(2, 8)
    inputs = {"decoder_input_ids": tokens.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model.eval()(tokens, **inputs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_nf4_is_what_bitsandbytes_writes(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor of the output, name, shape, dtype and bytes, is that of the source quantized by transformers with
    bitsandbytes and saved; GPT-2's transposed weights too, cut into few columns at a time."""
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 2**9)
    source = made(family, tmp_path / "source", dtype)
    quantize(source, tmp_path / "ours", to="nf4")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"][
            "llm_int8_skip_modules"
        ],
    )  # fmt: skip
    theirs = kind(family).from_pretrained(source, quantization_config=settings, dtype=dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        if "quant_state" in name:
            assert json.loads(bytes(ours[name])) == json.loads(bytes(tensor))
        else:
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("to", ["nf4", "int8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_computes_with_the_decoded_weights(family: str, to: Any, tmp_path: Path) -> None:
    """A model loaded from the output keeps its codes in memory and has the logits of the source model with the weights
    decoded by hand, within BF16's rounding, in which bitsandbytes multiplies NF4 where the processor can; INT8 within
    that of activations in 8 bits."""
    source, output = made(family, tmp_path / "source"), tmp_path / "output"
    report = quantize(source, output, to=to, layout="bitsandbytes")
    loaded, plain = (kind(family).from_pretrained(path, dtype=torch.float32) for path in (output, source))
    after, parameters = load_file(output / "model.safetensors"), dict(plain.named_parameters())
    assert {tensor.format for tensor in report.converted} == {to}
    for tensor in report.converted:
        held = after[tensor.name]
        assert held.dtype == {"nf4": torch.uint8, "int8": torch.int8}[to]
        if to == "nf4":
            pairs = held.flatten()
            codes = torch.stack((pairs >> 4, pairs & 15), dim=1).flatten()
            weight = torch.tensor(NF4_GRID)[codes.int()].view(-1, 64) * after[f"{tensor.name}.absmax"].unsqueeze(-1)
        else:
            weight = int8_vectorwise_dequant(held, after[tensor.name.removesuffix(".weight") + ".SCB"])
        rows, inputs = parameters[tensor.name].shape
        turned = family == "gpt2"
        weight = weight.reshape(inputs, rows).t() if turned else weight.reshape(rows, inputs)
        error = (weight - parameters[tensor.name].detach()).abs().max()
        assert float(error) == pytest.approx(tensor.largest_error, rel=1e-3)
        parameters[tensor.name].data = weight.contiguous()
    memory = sum(parameter.nbytes for parameter in loaded.parameters())
    assert memory < 0.8 * sum(parameter.nbytes for parameter in plain.parameters())
    error = (logits(loaded) - logits(plain)).norm() / logits(plain).norm()
    assert float(error) < (0.01 if to == "nf4" else 0.05)


def test_a_wrong_number_is_found_down_its_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in a weight that is read by columns is named with its index in the file."""
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 2**9)
    source = made("gpt2", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name][7, 201] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFileError, match=r"'transformer.h.1.mlp.c_fc.weight' holds nan at index \[7, 201\]"):
        quantize(source, tmp_path / "output", to="nf4")
    assert not (tmp_path / "output").exists()


def test_what_does_not_suit_is_refused(tiny: Maker, tmp_path: Path) -> None:
    """Rows that are no whole blocks, which bitsandbytes decodes wrongly on a CPU, and groups are refused."""
    output = tmp_path / "output"
    with pytest.raises(UsageError, match=r"no linear weight for bitsandbytes' NF4: rows must be multiples of 64"):
        quantize(tiny("llama"), output, to="nf4")
    with pytest.raises(UsageError, match="absmax scales by channel"):
        quantize(tiny("untied"), output, to="int8", layout="bitsandbytes", granularity=PerGroup(16))
    assert not output.exists()
