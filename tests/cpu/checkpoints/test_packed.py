"""INT4 and INT8 by group: packed as compressed-tensors packs, and what transformers makes of the result."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from brim.checkpoints.convert import quantize
from brim.checkpoints.layouts.pack_quantized import pack
from brim.checkpoints.mixture import parse_mixture
from brim.checkpoints.targets import Target
from brim.errors import UsageError
from brim.numerics.granularity import PerChannel, PerGroup, PerTensor

Maker = Callable[..., Path]
BITS = {"int4": 4, "int8": 8}


@pytest.mark.parametrize("inputs", [1, 7, 8, 12, 32, 40])
@pytest.mark.parametrize("bits", BITS.values())
def test_words_are_compressed_tensors(bits: int, inputs: int) -> None:
    """Every code at every place is packed bit by bit as compressed-tensors packs it, rows that end in a word too."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (64, inputs), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(pack(codes, bits=bits), pack_to_int32(codes, bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "untied", "t5"])
@pytest.mark.parametrize("to", BITS)
def test_transformers_sees_the_nearest_codes(
    family: str, to: Target, dtype: torch.dtype, tiny: Maker, tmp_path: Path
) -> None:
    """A model loaded from the output has, at each linear weight, codes within half a step of the source times their
    scale, and everywhere else the source; it runs, and gives the logits of a model with those weights, bit by bit."""
    source, output = tiny(family, dtype=dtype), tmp_path / "output"
    report = quantize(source, output, to=to, granularity=PerGroup(16))
    before, after = (load_file(path / "model.safetensors") for path in (source, output))
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    loaded = kind.from_pretrained(output, dtype="auto").eval()
    plain = kind.from_pretrained(source, dtype="auto").eval()
    packed = {name.removesuffix("_packed") for name in after if name.endswith("_packed")}
    assert len(packed) >= 14 and packed <= before.keys()
    assert {tensor.name for tensor in report.converted} == packed
    assert {tensor.format for tensor in report.converted} == {to}
    assert {name: tensor for name, tensor in after.items() if name in before}.keys() == before.keys() - packed
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    for name in packed:
        scale = after[f"{name}_scale"].float().repeat_interleave(16, dim=1)
        codes = unpack_from_int32(after[f"{name}_packed"], BITS[to], torch.Size(after[f"{name}_shape"].tolist()))
        assert bool(((codes * scale - before[name].float()).abs() <= scale * 0.5001).all())
        parameters[name].data = (codes * scale).to(dtype)
    tokens = torch.arange(16).reshape(2, 8)
    inputs = {"decoder_input_ids": tokens.flip(1)} if family == "t5" else {}
    with torch.inference_mode():
        assert torch.equal(loaded(tokens, **inputs).logits, plain(tokens, **inputs).logits)


def test_what_does_not_suit_is_refused(tiny: Maker, tmp_path: Path) -> None:
    """Groups that do not fill a row, scales for floats, what is packed already, zero points and one scale for a tensor
    where they have no reader or no way of choosing them: each is refused with what to do, and nothing is written."""
    source, output = tiny("llama"), tmp_path / "output"
    with pytest.raises(UsageError, match=r"rows of 48 elements do not divide into groups of 32; use .* group:16"):
        quantize(source, output, to="int4")
    with pytest.raises(UsageError, match="granularity tensor has absmax scales"):
        quantize(source, output, to="int4", granularity=PerTensor(), scales="mse")
    with pytest.raises(UsageError, match="--asymmetric is for int8 and int4 of compressed-tensors"):
        quantize(source, output, to="int8", layout="torchao", symmetric=False)
    with pytest.raises(UsageError, match="leave --scales mse away"):
        quantize(source, output, to="int4", granularity=PerChannel(), scales="mse", symmetric=False)
    with pytest.raises(UsageError, match="zero points of one format alone"):
        mixture = parse_mixture(keep=(), formats=("*down_proj*=int8",))
        quantize(source, output, to="int4", granularity=PerGroup(16), mixture=mixture, symmetric=False)
    with pytest.raises(UsageError, match="no effect"):
        quantize(source, output, to="bf16", granularity=PerChannel())
    assert not output.exists()
    quantize(source, output, to="int4", granularity=PerChannel())
    (output / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(UsageError, match=r"quantized already .*weight_packed"):
        quantize(output, tmp_path / "again", to="int8")


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_fp8_is_torchs_cast_of_scaled_rows(family: str, tiny: Maker, tmp_path: Path) -> None:
    """An FP8 output is, by row, torch's cast at scale absmax/448; transformers gives the logits of those weights."""
    source, output = tiny(family), tmp_path / "output"
    assert {tensor.format for tensor in quantize(source, output, to="fp8").converted} == {"fp8_e4m3"}
    before, after = (load_file(path / "model.safetensors") for path in (source, output))
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    loaded, plain = (kind.from_pretrained(path, dtype="auto").eval() for path in (output, source))
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    small = [name for name, tensor in after.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(small) >= 14
    for name in small:
        scale = before[name].abs().amax(dim=1, keepdim=True) / 448
        assert torch.equal(after[f"{name}_scale"], scale)
        cast = (before[name] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(after[name].float(), cast.float())
        parameters[name].data = cast.float() * scale
    tokens = torch.arange(16).reshape(2, 8)
    inputs = {"decoder_input_ids": tokens.flip(1)} if family == "t5" else {}
    with torch.inference_mode():
        assert torch.equal(loaded(tokens, **inputs).logits, plain(tokens, **inputs).logits)
