"""MXFP4: the nearest values of the OCP grid, packed as compressed-tensors packs, and what transformers makes of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from brim.checkpoints.convert import quantize
from brim.numerics.formats import FORMATS
from brim.numerics.mx_blocks import decode_blocks, encode_blocks, pack_nibbles, unpack_nibbles
from brim.numerics.represent import fitted_scale, represent

Maker = Callable[..., Path]
ROW = FORMATS["mxfp4"]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
HALVES = st.sampled_from([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 7.5, -0.0, 2.0**-149, -(2.0**-127)])
BLOCKS = arrays(np.float32, (2, 64), elements=FINITE | HALVES)


@settings(max_examples=60, deadline=None)
@given(BLOCKS)
def test_each_element_is_the_nearest_of_exact_arithmetic(values: np.ndarray) -> None:
    """The block's power of two is that of its largest element, and each element decodes to the value that exact
    arithmetic finds nearest for that scale: at most half a step of the grid away, unless it lies past the largest."""
    blocks = encode_blocks(torch.from_numpy(values))
    decoded = decode_blocks(blocks).numpy().reshape(-1, 32)
    clipped = 0
    for found, exponent, block in zip(
        decoded, blocks.exponents.flatten().tolist(), values.reshape(-1, 32), strict=True
    ):
        scale = fitted_scale(ROW, float(max(block, key=abs)))
        assert 2.0 ** (exponent - 127) == scale
        for got, number in zip(found.tolist(), block.tolist(), strict=True):
            assert got == represent(ROW, number, scale=scale).value
            size = abs(number) / scale
            step = 0.5 if size < 2 else 1 if size < 4 else 2
            assert abs(got - number) <= step / 2 * scale or size > 6
            clipped += size > 7
    assert blocks.num_clipped == clipped


@settings(max_examples=60, deadline=None)
@given(
    arrays(
        np.float32,
        (2, 64),
        elements=st.floats(width=32, min_value=-(2.0**99), max_value=2.0**99, allow_subnormal=False),
    )
)
def test_values_are_gguf_pys_but_for_ties(values: np.ndarray) -> None:
    """gguf-py, which has MXFP4 too, finds the same scales, and values as near: another one only of two equally near."""
    largest = np.abs(values).reshape(-1, 32).max(axis=1)
    assume(bool(((largest == 0) | (largest >= 2.0**-120)).all()))  # gguf-py divides by its scale, which overflows below
    theirs = dequantize(gguf_quantize(values, GGMLQuantizationType.MXFP4), GGMLQuantizationType.MXFP4)
    ours = decode_blocks(encode_blocks(torch.from_numpy(values))).numpy()
    assert np.array_equal(np.abs(ours - values), np.abs(theirs - values))


@given(st.integers(0, 2**32 - 1))
def test_bytes_are_compressed_tensors(seed: int) -> None:
    """Codes are packed bit by bit as compressed-tensors packs their values, and unpacked to what it unpacks."""
    codes = torch.randint(0, 16, (3, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_nibbles(codes)
    values = unpack_fp4_from_uint8(packed, 3, 64, dtype=torch.float32)
    assert torch.equal(packed, pack_fp4_to_uint8(values))
    assert torch.equal(unpack_nibbles(packed), codes)


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("t5", torch.bfloat16)])
def test_transformers_sees_these_weights(family: str, dtype: torch.dtype, tiny: Maker, tmp_path: Path) -> None:
    """A model loaded from the output gives, bit by bit, the logits of the source with each linear weight whose rows are
    whole blocks replaced by our decoding; the others are as they were, and the report says which."""
    source, output = tiny(family, dtype=dtype), tmp_path / "output"
    report = quantize(source, output, to="mxfp4")
    before, after = (load_file(path / "model.safetensors") for path in (source, output))
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    loaded, plain = (kind.from_pretrained(path, dtype="auto").eval() for path in (output, source))
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    packed = {name.removesuffix("_packed") for name in after if name.endswith("_packed")}
    assert {tensor.name for tensor in report.converted} == packed and len(packed) >= 10
    assert {tensor.format for tensor in report.converted} == {"mxfp4"}
    assert not [name for name in packed if before[name].shape[1] % 32]
    for tensor in report.converted:
        blocks = encode_blocks(before[tensor.name])
        assert torch.equal(after[f"{tensor.name}_packed"], pack_nibbles(blocks.codes))
        assert torch.equal(after[f"{tensor.name}_scale"], blocks.exponents)
        assert tensor.bytes_after == ROW.nbytes(before[tensor.name].numel())
        parameters[tensor.name].data = decode_blocks(blocks).to(dtype)
    tokens = torch.arange(16).reshape(2, 8)
    inputs = {"decoder_input_ids": tokens.flip(1)} if family == "t5" else {}
    with torch.inference_mode():
        assert torch.equal(loaded(tokens, **inputs).logits, plain(tokens, **inputs).logits)
