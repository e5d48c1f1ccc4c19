"""torchao's INT8 and FP8: what torchao itself writes of the same elements, and what transformers makes of ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, TorchAoConfig

from brim.checkpoints import job
from brim.checkpoints.convert import quantize
from brim.checkpoints.float_rows import encode_float_rows
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.targets import Target, element_format
from brim.checkpoints.writer import plan_shards
from brim.numerics.encode import TORCH_DTYPES
from brim.numerics.formats import FORMATS
from brim.numerics.represent import represent

Maker = Callable[..., Path]


def logits(model: Any) -> Tensor:
    tokens = torch.arange(16).reshape(2, 8)
    inputs = {"decoder_input_ids": tokens.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model.eval()(tokens, **inputs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "untied", "t5"])
def test_transformers_keeps_the_codes(
    family: str, dtype: torch.dtype, tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model loaded from the output, in shards too, holds Int8Tensors with our codes and scales, everything else as it
    was, and has the logits of the source model with these decoded; what torchao saves of the
    source has the same names, shapes, dtypes and facts."""
    kind: Any = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    monkeypatch.setattr(job, "plan_shards", lambda *a, **k: plan_shards(*a, **(k | {"limit_bytes": 12_000})))
    source, output = tiny(family, dtype=dtype), tmp_path / "output"
    report = quantize(source, output, to="int8", layout="torchao")
    after: dict[str, Tensor] = {}
    shards = sorted(output.glob("*.safetensors"))
    assert len(shards) > 1
    for path in shards:
        after |= load_file(path)
    loaded, plain = (kind.from_pretrained(path, dtype="auto") for path in (output, source))
    held, parameters = dict(loaded.named_parameters()), dict(plain.named_parameters())
    assert len(report.converted) >= 14 - (family == "t5") * 2
    for tensor in report.converted:
        module = tensor.name.removesuffix(".weight")
        codes, scale = after[f"{module}._weight_qdata"], after[f"{module}._weight_scale"]
        weight: Any = held[tensor.name]
        assert type(weight.data).__name__ == "Int8Tensor"
        assert torch.equal(weight.qdata, codes) and torch.equal(weight.scale, scale)
        parameters[tensor.name].data = (codes.float() * scale.float()).to(dtype)
    error = (logits(loaded).float() - logits(plain).float()).norm() / logits(plain).float().norm()
    assert float(error) < (1e-5 if dtype == torch.float32 else 0.02)
    settings = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    kind.from_pretrained(source, quantization_config=settings, dtype=dtype).save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    with safe_open(shards[0], "pt") as ours, safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as saved:
        facts, expected = ours.metadata(), saved.metadata()
    assert {name: json.loads(fact) for name, fact in facts.items() if name in held} == {
        name: json.loads(fact) for name, fact in expected.items() if name in held
    }


@pytest.mark.parametrize(("to", "family"), [("fp8_e5m2", "untied"), ("fp8", "t5"), ("fp8_e5m2", "t5")])
def test_transformers_keeps_fp8_elements(family: str, to: Target, tiny: Maker, tmp_path: Path) -> None:
    """A model loaded from the output holds Float8Tensors with our elements and scales, and has the logits of the source
    model with these decoded; what torchao saves of the source has the same names, dtypes, shapes and facts."""
    kind: Any = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    source, output, dtype = tiny(family), tmp_path / "output", TORCH_DTYPES[element_format(to)]
    report = quantize(source, output, to=to, layout="torchao")
    after = load_file(output / "model.safetensors")
    loaded, plain = (kind.from_pretrained(path, dtype="auto") for path in (output, source))
    held, parameters = dict(loaded.named_parameters()), dict(plain.named_parameters())
    assert len(report.converted) >= 12 and {tensor.format for tensor in report.converted} == {element_format(to)}
    for tensor in report.converted:
        module = tensor.name.removesuffix(".weight")
        elements, scale = after[f"{module}._weight_qdata"], after[f"{module}._weight_scale"]
        weight: Any = held[tensor.name]
        assert type(weight.data).__name__ == "Float8Tensor" and weight.qdata.dtype == elements.dtype == dtype
        assert torch.equal(weight.qdata.float(), elements.float()) and torch.equal(weight.scale, scale)
        parameters[tensor.name].data = elements.float() * scale
    assert float((logits(loaded) - logits(plain)).norm() / logits(plain).norm()) < 1e-5
    settings = TorchAoConfig(Float8WeightOnlyConfig(weight_dtype=dtype))
    kind.from_pretrained(source, quantization_config=settings).save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    with safe_open(output / "model.safetensors", "pt") as ours:
        facts = {name: json.loads(fact) for name, fact in ours.metadata().items() if name in held}
    with safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as saved:
        assert facts == {name: json.loads(fact) for name, fact in saved.metadata().items() if name in held}


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.float32, (3, 8), elements=st.floats(width=32, min_value=-(2.0**99), max_value=2.0**99)),
    st.sampled_from(["fp8_e5m2", "fp8_e4m3"]), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_fp8_elements_are_the_nearest_of_exact_arithmetic(
    values: np.ndarray, format: str, scale_dtype: torch.dtype
) -> None:
    """Each element divided by its row's stored scale is the value of the format that exact arithmetic finds nearest to
    that quotient, so never Inf, and past the largest only where the scale was rounded down."""
    encoded = encode_float_rows(torch.from_numpy(values), Scratch(), format=format, scale_dtype=scale_dtype)
    elements, scale = encoded.parts
    row = FORMATS[format]
    for found, stored, numbers in zip(elements.float().tolist(), scale.float(), values, strict=True):
        for got, quotient in zip(found, (torch.from_numpy(numbers) / stored).tolist(), strict=True):
            bounded = max(-row.largest, min(row.largest, quotient))
            assert got == represent(row, bounded).value
