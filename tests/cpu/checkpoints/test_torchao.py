"""torchao's INT8: what torchao itself writes of the same codes, and what transformers makes of ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, TorchAoConfig

from brim.checkpoints import job
from brim.checkpoints.convert import quantize
from brim.checkpoints.writer import plan_shards

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
