"""INT8 and INT4 with zero points: what compressed-tensors makes of the same weights, and what transformers reads."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from brim.checkpoints import stream
from brim.checkpoints.convert import quantize
from brim.checkpoints.layouts.pack_quantized import pack_zeros
from brim.checkpoints.targets import Target
from brim.numerics.encode import bit_codes, decode_between, encode_between, encode_integer
from brim.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor

Maker = Callable[..., Path]
BITS = {"int4": 4, "int8": 8}
NUMBERS = st.floats(width=32, min_value=-(2.0**99), max_value=2.0**99)


@settings(max_examples=80, deadline=None)
@given(
    arrays(np.float32, (3, 32), elements=NUMBERS), st.sampled_from(list(BITS)),
    st.sampled_from([PerChannel(), PerGroup(8), PerGroup(16)]),
)  # fmt: skip
@example(np.full((3, 32), 2.2e-44, dtype=np.float32), "int4", PerChannel())
def test_no_element_is_further_than_half_a_step(values: np.ndarray, format: str, granularity: Granularity) -> None:
    """With FP32 scales every element decodes to within half a step, of those that lie between code and code; 0 decodes
    to 0 exactly; and all elements of one sign use the full range of codes on their side of zero."""
    weight = torch.from_numpy(values)
    encoded = encode_between(weight, format=format, granularity=granularity)
    decoded = decode_between(encoded.codes, encoded.scale, encoded.zero, granularity=granularity)
    step = encoded.scale.repeat_interleave(32 // encoded.scale.shape[1], dim=1).double()
    # a scale is off by half of FP32's smallest number at most, and a code is so many of it
    rounding = 2.0**-150 * 2 ** BITS[format]
    assert bool(((decoded.double() - weight.double()).abs() <= step * 0.50001 + rounding).all())
    assert bool((decoded[weight == 0] == 0).all())
    low, high = bit_codes(format)
    assert int(encoded.codes.min()) >= low and int(encoded.codes.max()) <= high


@pytest.mark.parametrize("rows", [1, 4, 7, 8, 13, 16])
@pytest.mark.parametrize("bits", BITS.values())
def test_words_of_zero_points_are_compressed_tensors(bits: int, rows: int) -> None:
    """Zero points are packed bit by bit as compressed-tensors packs them, columns that end in a word too."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    zero = torch.randint(low, high, (rows, 5), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(pack_zeros(zero, bits=bits), pack_to_int32(zero, bits, packed_dim=0))


@pytest.mark.parametrize(
    ("to", "family", "granularity"),
    [("int4", "untied", PerGroup(16)), ("int8", "t5", PerChannel()), ("int4", "t5", PerChannel())],
)
def test_output_is_compressed_tensors_and_transformers_reads_it(
    to: Target, family: str, granularity: Granularity, tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales and zero points are those of compressed-tensors' own qparams (scales but for a bit: they subtract
    before they divide), and words, bit by bit, those that its compressor gives for them, cut into blocks that end
    inside a word of zero points too; a model loaded from the output has the logits of our decoding, bit by bit."""
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 200)
    monkeypatch.setattr(stream, "CHUNK_BLOCKS", 1)
    source, output = tiny(family), tmp_path / "output"
    report = quantize(source, output, to=to, granularity=granularity, symmetric=False)
    before, after = (load_file(path / "model.safetensors") for path in (source, output))
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    loaded, plain = (kind.from_pretrained(path, dtype="auto").eval() for path in (output, source))
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    args = QuantizationArgs(
        num_bits=BITS[to], symmetric=False,
        strategy=QuantizationStrategy.GROUP if isinstance(granularity, PerGroup) else QuantizationStrategy.CHANNEL,
        group_size=16 if isinstance(granularity, PerGroup) else None,
    )  # fmt: skip
    assert len(report.converted) >= 14 and {tensor.format for tensor in report.converted} == {to}
    for tensor in report.converted:
        weight = before[tensor.name]
        groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        ours = encode_between(weight, format=to, granularity=granularity)
        assert torch.allclose(ours.scale, scale, rtol=2e-7, atol=0) and torch.equal(ours.zero, zero.to(torch.int8))
        state = {"weight": weight, "weight_scale": ours.scale, "weight_zero_point": ours.zero}
        theirs = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
        for name, expected in theirs.items():
            assert torch.equal(after[tensor.name.removesuffix("weight") + name], expected)
        parameters[tensor.name].data = decode_between(ours.codes, ours.scale, ours.zero, granularity=granularity)
    tokens = torch.arange(16).reshape(2, 8)
    inputs = {"decoder_input_ids": tokens.flip(1)} if family == "t5" else {}
    with torch.inference_mode():
        assert torch.equal(loaded(tokens, **inputs).logits, plain(tokens, **inputs).logits)


@pytest.mark.parametrize(
    ("to", "family", "dtype"),
    [("int8", "untied", torch.float32), ("int4", "t5", torch.bfloat16), ("fp8", "untied", torch.bfloat16)],
)
def test_one_scale_for_a_tensor(to: Target, family: str, dtype: torch.dtype, tiny: Maker, tmp_path: Path) -> None:
    """With granularity tensor each weight has one scale, by which its largest element is the last code, and elements
    are the nearest to those; transformers gives, bit by bit, the logits of the decoded weights."""
    source, output = tiny(family, dtype=dtype), tmp_path / "output"
    report = quantize(source, output, to=to, granularity=PerTensor())
    before, after = (load_file(path / "model.safetensors") for path in (source, output))
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    loaded, plain = (kind.from_pretrained(path, dtype="auto").eval() for path in (output, source))
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    for tensor in report.converted:
        weight = before[tensor.name].float()
        if to == "fp8":
            scale = (weight.abs().max() / 448).to(dtype).view(1)
            values = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(after[tensor.name].float(), values.float())
        else:
            codes, scale, _ = encode_integer(weight, format=to, granularity=PerTensor(), scale_dtype=dtype)
            values = codes
            if to == "int8":
                assert torch.equal(after[tensor.name], codes)
            else:
                assert torch.equal(after[f"{tensor.name}_packed"], pack_to_int32(codes, 4))
        assert torch.equal(after[f"{tensor.name}_scale"], scale)
        assert tensor.scale_min == tensor.scale_max == float(scale)
        parameters[tensor.name].data = (values.float() * scale.float()).to(dtype)
    assert len(report.converted) >= 14
    tokens = torch.arange(16).reshape(2, 8)
    inputs = {"decoder_input_ids": tokens.flip(1)} if family == "t5" else {}
    with torch.inference_mode():
        assert torch.equal(loaded(tokens, **inputs).logits, plain(tokens, **inputs).logits)
