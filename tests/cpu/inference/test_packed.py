"""Packed models against transformers' own reading of the same files, and against their unpacked weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from brim.checkpoints.convert import quantize
from brim.cli import main
from brim.errors import UsageError
from brim.inference import Loaded, generate, load, perplexity, resident_bytes
from brim.inference.packed import FORMATS, stored_packings
from brim.layers.packed_embedding import PackedEmbedding
from brim.layers.packed_linear import PackedLinear
from brim.memory.measured import CpuMeter
from brim.models import describe
from brim.numerics.granularity import PerGroup

TEXT = "Filled to the brim and never over it. " * 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "int8": {"to": "int8"},
    "int8, groups": {"to": "int8", "granularity": PerGroup(32)},
    "int4": {"to": "int4", "granularity": PerGroup(32)},
    "fp8": {"to": "fp8"},
    "nf4": {"to": "nf4"},
}
Directory = Callable[[str], Path]


def linears(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def score(loaded: Loaded) -> float:
    return perplexity(loaded, TEXT, window=64, stride=32).value


def with_weights(loaded: Loaded, like: Path) -> Loaded:
    """The plain model of a directory with what this one's packed modules stand for."""
    plain = load(like)
    for name, module in loaded.model.named_modules():
        if isinstance(module, PackedLinear):
            target = plain.model.get_submodule(name).weight
            weight_RK = module.unpacked().to(target.dtype)
            target.data = weight_RK.T.contiguous() if module.transposed else weight_RK
    return plain


@pytest.fixture(scope="session", params=list(LAYOUTS))
def stored(request: pytest.FixtureRequest, tiny_directory: Directory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "model"
    quantize(tiny_directory("llama-wide"), output, **LAYOUTS[request.param])
    return output


def test_stored_weights_stay_packed_and_mean_the_same(stored: Path) -> None:
    """Every layer that the file holds packed is packed in memory, and scores as transformers' unpacked model."""
    loaded = load(stored)
    theirs = AutoModelForCausalLM.from_pretrained(stored).eval()
    assert len(linears(loaded.model)) == 14
    assert resident_bytes(loaded.model) < 0.65 * sum(4 * tensor.numel() for tensor in theirs.parameters())
    # bitsandbytes' modules multiply in BF16
    allowed = 0.01 if any(parameter.dtype == torch.uint8 for parameter in theirs.parameters()) else 1e-5
    assert score(loaded) == pytest.approx(score(Loaded(theirs, loaded.tokenizer)), rel=allowed)


def test_stored_weights_generate_in_bf16(stored: Path) -> None:
    """In BF16 the kernels for few rows run; the text is that of the unpacked weights in BF16, or all but."""
    loaded = load(stored, compute=torch.bfloat16)
    assert {layer.compute for layer in linears(loaded.model)} == {torch.bfloat16}
    assert generate(loaded, "abc", max_tokens=4).new_tokens > 0
    assert score(loaded) == pytest.approx(score(load(stored)), rel=0.05)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-wide"])
def test_packed_on_the_way_in(family: str, format: str, tiny_directory: Directory) -> None:
    """Tied or not, transposed or not: the packed model scores as the plain one with the weights it stands for."""
    loaded = load(tiny_directory(family), pack=format)
    embedding = loaded.model.get_input_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert resident_bytes(loaded.model) < 0.4 * resident_bytes(load(tiny_directory(family)).model)
    plain = with_weights(loaded, tiny_directory(family))
    if not loaded.model.config.tie_word_embeddings:
        plain.model.get_input_embeddings().weight.data = embedding(torch.arange(257))
    allowed = 0.2 if format == "w8a8" else 1e-4
    assert score(loaded) == pytest.approx(score(plain), rel=allowed)


def test_an_encoder_decoder_keeps_its_embeddings(tiny_directory: Directory) -> None:
    """T5 packs its linears and not what it keeps in FP32, and generates."""
    loaded = load(tiny_directory("t5"), pack="int8", compute=torch.bfloat16)
    assert linears(loaded.model) and isinstance(loaded.model.get_input_embeddings(), nn.Embedding)
    assert not any(name.endswith(".wo") for name, m in loaded.model.named_modules() if isinstance(m, PackedLinear))
    assert generate(loaded, "abc", max_tokens=3).new_tokens > 0


def test_loading_holds_the_packed_model_and_one_tensor(tmp_path: Path, tokenizer: Any) -> None:
    """While weights are packed as they are read, no more is allocated than the result and some copies of one tensor."""
    config = LlamaConfig(
        vocab_size=257, hidden_size=128, intermediate_size=256, num_hidden_layers=12, num_attention_heads=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load(tmp_path, pack="int8")  # what is imported and cached at the first use is none of the model
    with CpuMeter() as meter:
        loaded = load(tmp_path, pack="int8")
        meter.sample()
    layers = linears(loaded.model)
    sizes = [4 * layer.in_features * layer.out_features for layer in layers]
    # the meter counts the file, which is mapped and no memory of its own
    allocated_bytes = meter.peak.allocated_bytes - (tmp_path / "model.safetensors").stat().st_size
    assert allocated_bytes < resident_bytes(loaded.model) + 8 * max(sizes) < sum(sizes) / 2


def test_the_rest_of_a_packed_model_is_packed_by_wish(tiny_directory: Directory, tmp_path: Path) -> None:
    """`pack` leaves stored codes as they are, and packs embedding and head beside them."""
    quantize(tiny_directory("llama-wide"), tmp_path / "int8", to="int8")
    stored, more = load(tmp_path / "int8"), load(tmp_path / "int8", pack="int8")
    by_name: dict[str, Tensor] = dict(more.model.named_buffers())
    for name, tensor in stored.model.named_buffers():
        assert torch.equal(by_name[name], tensor)
    assert resident_bytes(more.model) < resident_bytes(stored.model)


def test_forms_that_no_module_takes_are_left_to_transformers(tiny_directory: Directory, tmp_path: Path) -> None:
    """One scale for a whole tensor has no module here, so nothing of the model is taken as stored."""
    quantize(tiny_directory("llama-wide"), tmp_path / "int8", to="int8")
    path = tmp_path / "int8" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    assert len(stored_packings(describe(str(tmp_path / "int8"))) or {}) == 14
    save_file({**tensors, name: tensors[name].mean().reshape(1)}, path, metadata={"format": "pt"})
    assert stored_packings(describe(str(tmp_path / "int8"))) is None
    with pytest.raises(UsageError, match="is unpacked as it is read"):
        load(tmp_path / "int8", pack="int8")


def test_unknown_formats_are_refused(tiny_directory: Directory) -> None:
    """The refusal names the formats there are."""
    with pytest.raises(UsageError, match="formats: int8, w8a8, int4, nf4"):
        load(tiny_directory("llama"), pack="int3")


def test_the_command_line_packs(tiny_directory: Directory, capsys: pytest.CaptureFixture[str]) -> None:
    """`generate --format int8` says fewer bytes than without; `evaluate --format` another perplexity."""
    directory = str(tiny_directory("llama-wide"))
    said: list[dict[str, Any]] = []
    for options in ([], ["--format", "int8"]):
        assert main(["generate", directory, "abc", "--max-tokens", "4", "--json", *options]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[1]["resident_bytes"] < 0.4 * said[0]["resident_bytes"]
    assert main(["evaluate", directory, "--max-tokens", "60", "--window", "32", "--format", "int4"]) == 0
    assert main(["generate", directory, "abc", "--format", "int3"]) == 2
    assert "formats: int8" in capsys.readouterr().err
