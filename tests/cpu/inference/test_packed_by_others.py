"""INT8 files that bitsandbytes and torchao wrote: taken as they are, and worth what their writers say."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_dequant
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from brim.inference import generate, load, resident_bytes
from brim.layers.packed_linear import PackedLinear
from brim.layers.packing import Int8, Int8Shifted

Directory = Callable[[str], Path]
TOKENS = torch.arange(24).view(2, 12)
CONFIGS: dict[str, Any] = {
    "bitsandbytes": BitsAndBytesConfig(load_in_8bit=True),
    "torchao": TorchAoConfig(Int8WeightOnlyConfig(version=2)),
}


@pytest.fixture(scope="session", params=list(CONFIGS))
def theirs(request: pytest.FixtureRequest, tiny_directory: Directory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that the library quantized and transformers saved."""
    source, place = tiny_directory("llama-wide"), tmp_path_factory.mktemp("theirs") / request.param
    config = CONFIGS[request.param]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(place)
    for path in source.glob("*token*"):
        shutil.copyfile(path, place / path.name)
    return place


def decoded(directory: Path) -> dict[str, Tensor]:
    """Each quantized weight as its library's own arithmetic has it."""
    tensors = load_file(directory / "model.safetensors")
    if directory.name == "bitsandbytes":
        names = [name.removesuffix(".SCB") for name in tensors if name.endswith(".SCB")]
        return {name: int8_vectorwise_dequant(tensors[f"{name}.weight"], tensors[f"{name}.SCB"]) for name in names}
    model = AutoModelForCausalLM.from_pretrained(directory)
    modules = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    return {name: m.weight.dequantize() for name, m in modules.items() if hasattr(m.weight, "dequantize")}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS).logits
    return result


def test_their_int8_stays_packed_and_is_worth_what_they_say(theirs: Path, tiny_directory: Directory) -> None:
    """All linear layers hold the file's codes, none anew; the logits are those of the library's own dequantization."""
    loaded, weights = load(theirs), decoded(theirs)
    layers = {name: m for name, m in loaded.model.named_modules() if isinstance(m, PackedLinear)}
    assert len(layers) == 14 and layers.keys() == weights.keys() - {"lm_head"}
    tensors = load_file(theirs / "model.safetensors")
    for name, layer in layers.items():
        codes = tensors[f"{name}.weight"] if theirs.name == "bitsandbytes" else tensors[f"{name}._weight_qdata"]
        assert isinstance(layer.packing, Int8) and torch.equal(layer.held["weight"], codes)
        assert dict(layer.named_buffers()).keys() == {"weight", "scale"}
    assert resident_bytes(loaded.model) < 0.65 * resident_bytes(load(tiny_directory("llama-wide")).model)
    plain = load(tiny_directory("llama-wide")).model
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data = weight.float()
    torch.testing.assert_close(logits(loaded.model), logits(plain), rtol=1e-5, atol=1e-6)


def test_their_int8_generates_in_bf16(theirs: Path) -> None:
    """The kernels for few rows take it in BF16."""
    loaded = load(theirs, compute=torch.bfloat16)
    assert generate(loaded, "abc", max_tokens=4).new_tokens > 0
    assert torch.isfinite(logits(loaded.model)).all()


def test_codes_that_mean_zero_count(theirs: Path, tmp_path: Path) -> None:
    """torchao's files may shift the grid: a weight is (code - zero) * scale, packed as well."""
    if theirs.name != "torchao":
        pytest.skip("bitsandbytes' INT8 has no zero points")
    shutil.copytree(theirs, tmp_path / "shifted")
    path, name = tmp_path / "shifted" / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    zero = tensors[f"{name}._weight_zero_point"] + torch.arange(128, dtype=torch.int8).view(-1, 1) % 5
    save_file({**tensors, f"{name}._weight_zero_point": zero}, path, metadata={"format": "pt"})
    layer = load(tmp_path / "shifted").model.get_submodule(name)
    assert isinstance(layer.packing, Int8Shifted)
    expected = (tensors[f"{name}._weight_qdata"].float() - zero.float()) * tensors[f"{name}._weight_scale"]
    torch.testing.assert_close(layer.unpacked(), expected, rtol=1e-6, atol=0)
