"""Calibration: blocks run alone as the whole model runs; what is decided is what is written, and errs less."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from brim.checkpoints import convert
from brim.checkpoints.calibrate import decisions_of
from brim.checkpoints.convert import audit, quantize
from brim.checkpoints.decoder import FAMILIES, BlockwiseDecoder
from brim.checkpoints.targets import CalibrationText, Target
from brim.cli import main
from brim.errors import DataError, DoesNotFitError, UsageError
from brim.inference import held_text
from brim.models import describe
from brim.models.directory import stored_tensors
from brim.numerics.granularity import Granularity, PerGroup
from brim.units import MIB

VOCAB = 257
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=48),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=8),
    "smollm3": lambda: SmolLM3Config(**_SHAPE, no_rope_layers=[1, 0, 1]),
    "olmo2": lambda: Olmo2Config(**_SHAPE),
}
TEXT = CalibrationText(
    text="The lobsters are blue, only becoming 'lobster red' on cooking. Mating occurs in summer. " * 30
)
OTHER = "It may grow to a length of 60 cm and a mass of 6 kg, and bears a conspicuous pair of claws."


def tokenizer() -> Any:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={"<end>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def make(family: str, directory: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def small_sequences(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("brim.checkpoints.calibrate.SEQUENCE_TOKENS", 48)
    yield


def logits(directory: Path, text: str) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    with torch.inference_mode():
        return torch.as_tensor(model(tokenizer()(text, return_tensors="pt")["input_ids"][:, :48]).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_alone_give_the_whole_models_states(family: str, tmp_path: Path) -> None:
    """Hidden states after each block, one block in memory at a time, are those that the whole model has there."""
    source = make(family, tmp_path / family)
    spec = describe(str(source))
    decoder = BlockwiseDecoder(spec, {tensor.spec.name: tensor for tensor in stored_tensors(source)})
    tokens = torch.arange(1, 1 + min(48, decoder.max_tokens))
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.inference_mode():
        model(tokens.unsqueeze(0))
        hidden = decoder.embedded(tokens)
        for number, block in enumerate(decoder.blocks):
            with decoder.loaded(block) as linears:
                hidden = decoder.run(block, hidden)
                assert len(linears) == 7
            assert all(parameter.is_meta for parameter in block.parameters())
            assert torch.allclose(hidden, seen[number], rtol=1e-5, atol=1e-5)
    assert len(decoder.blocks) == len(seen) == 3


CASES = [("int4", PerGroup(16), torch.float32), ("int4", PerGroup(16), torch.bfloat16), ("int8", None, torch.float32)]


@pytest.mark.parametrize(("to", "granularity", "dtype"), CASES)
def test_calibrated_models_are_nearer_the_source(
    to: Target, granularity: Granularity | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    """On text of the calibration's kind that was not in it, logits err less than with searched scales and with absmax;
    the layout is the same; no trace of the calibration is left, and the same bytes come out again."""
    source = make("llama", tmp_path / "source", dtype=dtype)
    exact = logits(source, OTHER).float()
    errors = {}
    for scales in ("absmax", "mse", "calibrated", "again"):
        calibrated = scales in ("calibrated", "again")
        quantize(
            source, tmp_path / scales, to=to, granularity=granularity,
            scales="calibrated" if calibrated else scales, calibration=TEXT if calibrated else None,  # type: ignore[arg-type]
        )  # fmt: skip
        errors[scales] = float((logits(tmp_path / scales, OTHER).float() - exact).norm())
    assert errors["calibrated"] < min(errors["mse"], errors["absmax"])
    plain, fed, again = (tmp_path / name / "model.safetensors" for name in ("mse", "calibrated", "again"))
    assert {n: t.dtype for n, t in load_file(plain).items()} == {n: t.dtype for n, t in load_file(fed).items()}
    assert fed.read_bytes() == again.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["absmax", "again", "calibrated", "mse", "source"]


def test_the_report_is_of_what_was_written(tmp_path: Path) -> None:
    """The report's largest error is that of the codes and scales in the file; progress ends at its total."""
    source, output = make("llama", tmp_path / "source"), tmp_path / "output"
    told: list[tuple[int, int]] = []
    report = quantize(
        source, output, to="int4", granularity=PerGroup(16), scales="calibrated", calibration=TEXT,
        calibration_progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert [done for done, _ in told] == list(range(1, told[-1][1] + 1))
    before, after = (load_file(path / "model.safetensors") for path in (source, output))
    assert len(report.converted) == 21
    for tensor in report.converted:
        shape = torch.Size(after[f"{tensor.name}_shape"].tolist())
        codes = unpack_from_int32(after[f"{tensor.name}_packed"], 4, shape)
        decoded = codes * after[f"{tensor.name}_scale"].repeat_interleave(16, dim=1)
        assert float((decoded - before[tensor.name]).abs().max()) == pytest.approx(tensor.largest_error, rel=1e-6)


def test_a_killed_conversion_goes_on_with_what_was_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the calibration, `resume` does not calibrate again and gives the undisturbed output's bytes; with
    another text it is other work."""
    source = make("llama", tmp_path / "source")
    settings: dict[str, Any] = {"to": "int4", "granularity": PerGroup(16), "scales": "calibrated"}
    quantize(source, tmp_path / "undisturbed", **settings, calibration=TEXT)
    output = tmp_path / "output"

    def killed(*args: object, **named: object) -> None:
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(convert, "verify", killed)
        quantize(source, output, **settings, calibration=TEXT)
    os.waitpid(child, 0)
    assert decisions_of(output).is_dir() and not output.exists()
    with pytest.raises(UsageError, match="killed run of another"):
        other = CalibrationText(text=TEXT.text[5:])
        quantize(source, output, **settings, calibration=other, resume=True)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(convert, "verify", killed)
        quantize(source, output, **settings, calibration=TEXT)
    os.waitpid(child, 0)
    told: list[int] = []
    quantize(
        source, output, **settings, calibration=TEXT, resume=True,
        calibration_progress=lambda done, total: told.append(done),
    )  # fmt: skip
    assert not told
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "undisturbed/model.safetensors").read_bytes()
    assert not decisions_of(output).exists()


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    """Families whose blocks are not known, floats, too little text or memory, no text, an audit, and the text that
    models are judged by: refused with the reason, and nothing is left."""
    source, output = make("llama", tmp_path / "source"), tmp_path / "output"
    with pytest.raises(UsageError, match="block by block"):
        quantize(tiny("t5"), output, to="int8", scales="calibrated", calibration=TEXT)
    with pytest.raises(UsageError, match="for integers"):
        quantize(source, output, to="fp8", scales="calibrated", calibration=TEXT)
    with pytest.raises(DataError, match="a sequence 48"):
        quantize(source, output, to="int8", scales="calibrated", calibration=CalibrationText(text="short"))
    with pytest.raises(DoesNotFitError, match="allow more"):
        quantize(source, output, to="int8", scales="calibrated", calibration=TEXT, memory_bytes=MIB // 8)
    for scales, text in (("calibrated", None), ("mse", TEXT)):
        with pytest.raises(UsageError, match="need a text"):
            quantize(source, output, to="int8", scales=scales, calibration=text)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="weights alone"):
        audit(source, to="int8", scales="calibrated")
    judged = tmp_path / "judged.txt"
    judged.write_text(held_text()[2000:30000])
    assert main(["quantize", str(source), "--to", "int8", "--calibration", str(judged)]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judged.txt", "source", "t5"]
