"""Loading from a directory: the same model comes back, and what cannot be loaded says why."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from brim.errors import BrimError, DataError, ModelFileError
from brim.inference import Loaded, generate, held_text, load, locate, perplexity, read_text

TEXT = "Filled to the brim and never over it. " * 4


def save(loaded: Loaded, directory: Path) -> Path:
    loaded.model.save_pretrained(directory)
    loaded.tokenizer.save_pretrained(directory)
    return directory


def test_saved_model_scores_the_same(causal: Loaded, tmp_path: Path) -> None:
    """A model saved and loaded has the perplexity it had, bit for bit, and is in evaluation mode."""
    before = perplexity(causal, TEXT, window=64, stride=32)
    again = load(save(causal, tmp_path))
    assert perplexity(again, TEXT, window=64, stride=32).value == before.value
    assert not again.model.training


def test_encoder_decoder_loads_with_its_head(t5: Loaded, tmp_path: Path) -> None:
    """A T5 directory loads as a model that generates."""
    again = load(save(t5, tmp_path))
    assert again.is_seq2seq
    assert generate(again, "abc", max_tokens=5).text == generate(t5, "abc", max_tokens=5).text


def test_stored_precision_is_kept(llama: Loaded, tmp_path: Path) -> None:
    """Weights stored in BF16 stay BF16 in memory."""
    save(llama, tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "bfloat16"}))
    assert {parameter.dtype for parameter in load(tmp_path).model.parameters()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own; see inference/load.py
def test_adapter_directory_brings_its_base(llama: Loaded, tmp_path: Path) -> None:
    """A LoRA directory loads its base model with the adapter on it, found by the path it names."""
    base = save(llama, tmp_path / "base")
    adapted = get_peft_model(load(base).model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    llama.tokenizer.save_pretrained(tmp_path / "adapter")
    directory = locate(str(tmp_path / "adapter"))
    found = perplexity(load(directory), TEXT, window=64, stride=32).value
    expected = perplexity(Loaded(adapted.eval(), llama.tokenizer), TEXT, window=64, stride=32).value
    assert found == pytest.approx(expected, rel=1e-6)
    assert found != pytest.approx(perplexity(llama, TEXT, window=64, stride=32).value, rel=1e-4)


def test_missing_tensor_is_not_filled_with_random_numbers(llama: Loaded, tmp_path: Path) -> None:
    """A file without one of the model's tensors is refused, and the tensor named."""
    path = save(llama, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"1 tensors .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_damaged_files_name_the_directory(llama: Loaded, tmp_path: Path) -> None:
    """A truncated weight file, a config that is no JSON, no config and no tokenizer: each is a ModelFileError."""
    for number, (name, content) in enumerate(
        [("model.safetensors", b"\xff" * 40), ("config.json", b"{"), ("config.json", None), ("tokenizer.json", None)]
    ):
        path = save(llama, tmp_path / str(number)) / name
        path.unlink()
        if content:
            path.write_bytes(content)
        with pytest.raises(ModelFileError, match=str(path.parent)) as caught:
            load(path.parent)
        assert "\n" not in str(caught.value)


def test_int8_directory_is_its_weights_rounded(llama: Loaded, tmp_path: Path) -> None:
    """An INT8 model (compressed-tensors) scores as the same model with each weight rounded to its channel's grid."""
    coded, rounded = save(llama, tmp_path / "int8"), save(llama, tmp_path / "rounded")
    tensors = load_file(coded / "model.safetensors")
    plain = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(dim=1, keepdim=True) / 127
        tensors[name + "_scale"] = scale
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)
        plain[name] = tensors[name] * scale
    save_file(tensors, coded / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, rounded / "model.safetensors", metadata={"format": "pt"})
    config = coded / "config.json"
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "int-quantized"}},
    }
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": quantization}))
    found = perplexity(load(coded), TEXT, window=64, stride=32).value
    assert found == pytest.approx(perplexity(load(rounded), TEXT, window=64, stride=32).value, rel=1e-5)
    assert found != pytest.approx(perplexity(llama, TEXT, window=64, stride=32).value, rel=1e-5)


def test_adapter_that_names_no_base(tmp_path: Path) -> None:
    """An adapter's config without its base is refused by the key that is missing."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelFileError, match="base_model_name_or_path"):
        load(tmp_path)


def test_read_text_names_file_and_line(tmp_path: Path) -> None:
    """What is no text is refused with the file, and the line where it goes wrong."""
    path = tmp_path / "data.txt"
    with pytest.raises(DataError, match=r"data\.txt: cannot be read: No such file"):
        read_text(path)
    path.write_bytes("good\nstill g\u00f6\u00f6d\nbad ".encode() + b"\xff\nmore")
    with pytest.raises(DataError, match=r"data\.txt: line 3: byte 0xff is not UTF-8"):
        read_text(path)
    path.write_bytes(b" \n\n")
    with pytest.raises(DataError, match=r"data\.txt: line 1: the file holds no text"):
        read_text(path)
    path.write_text("g\u00f6\u00f6d", encoding="utf-8")
    assert read_text(path) == "g\u00f6\u00f6d"


def test_held_text_ships_with_the_package() -> None:
    """The excerpt is there, and long enough to tell models apart."""
    text = held_text()
    assert 60_000 < len(text.encode()) < 100_000
    assert "Michigan" in text


def test_code_of_a_model_never_runs(llama: Loaded, tmp_path: Path) -> None:
    """A config that names classes in files of the directory's own is refused or read without them."""
    save(llama, tmp_path)
    (tmp_path / "ours.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "ours.Config", "AutoModelForCausalLM": "ours.Model"}
    for told in (config, config | {"model_type": "ours"}):
        (tmp_path / "config.json").write_text(json.dumps(told))
        with suppress(BrimError):
            load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_expressions_of_files_end(llama: Loaded, tmp_path: Path) -> None:
    """An expression of exponential time, wherever in a quantized model's config, is refused before it is used."""
    save(llama, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for told in (
        {"ignore": ["re:(a+)+$"]},
        {"config_groups": {"group_0": {"targets": ["re:(.*)*x"]}}},
        {"re:(a|a)*": 1},
    ):
        quantized = {"quant_method": "compressed-tensors", **told}
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
        with pytest.raises(ModelFileError, match=r"quantization_config: pattern 're:.*a repeated group may take"):
            load(tmp_path)
