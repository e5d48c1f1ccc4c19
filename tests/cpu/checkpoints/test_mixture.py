"""Mixed models: each weight in the format its pattern or the budget says, and transformers reads them side by side."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from brim.checkpoints.convert import audit, quantize
from brim.checkpoints.mixture import Mixture, parse_mixture
from brim.checkpoints.within import within_budget
from brim.cli import main
from brim.errors import DoesNotFitError, UsageError
from brim.models import describe
from brim.models.directory import stored_tensors
from brim.numerics.granularity import PerGroup
from brim.units import MIB

Maker = Callable[..., Path]
BITS = {"int4": 4, "int8": 8}


def test_transformers_reads_formats_side_by_side(tiny: Maker, tmp_path: Path) -> None:
    """Of INT4 with some weights in INT8 and some kept, the loaded model gives the logits of the decoded weights, bit by
    bit; the last pattern that matches counts, and those that keep win."""
    source, output = tiny("llama"), tmp_path / "output"
    wide, kept = "down_proj", "o_proj"
    mixture = parse_mixture(keep=[f"*.{kept}.weight"], formats=[rf"re:.*\.{wide}\.weight=int8", f"*.{kept}.*=int8"])
    report = quantize(source, output, to="int4", granularity=PerGroup(16), mixture=mixture)
    before, after = (load_file(path / "model.safetensors") for path in (source, output))
    formats = {tensor.name: tensor.format for tensor in report.converted}
    assert {format for name, format in formats.items() if f".{wide}." in name} == {"int8"}
    assert {format for name, format in formats.items() if f".{wide}." not in name} == {"int4"}
    assert not any(f".{kept}." in name for name in formats)
    loaded, plain = (AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval() for path in (output, source))
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    for name, format in formats.items():
        shape = torch.Size(after[f"{name}_shape"].tolist())
        codes = unpack_from_int32(after[f"{name}_packed"], BITS[format], shape)
        scale = after[f"{name}_scale"].repeat_interleave(16, dim=1)
        assert bool(((codes * scale - before[name]).abs() <= scale * 0.5001).all())
        parameters[name].data = codes * scale
    tokens = torch.arange(16).reshape(2, 8)
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, plain(tokens).logits)


def test_a_budget_is_kept_with_the_least_error(tiny: Maker, tmp_path: Path) -> None:
    """The tensors of a model within a budget take no more than it, and no other choice of formats for its weights
    within the budget has less squared error, by the reports of models in one format; more room errs less."""
    source = tiny("llama")
    model = (source, describe(str(source)), stored_tensors(source))
    settings: dict[str, Any] = {"granularity": PerGroup(16), "scales": "absmax", "memory_bytes": 64 * MIB}
    keep = Mixture(keep=("*.layers.1.*", "*.mlp.*"))
    weights = {
        to: {t.name: t for t in audit(source, to=to, granularity=PerGroup(16)).tensors} for to in ("int4", "int8")
    }
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
    signal = {name: float(load_file(source / "model.safetensors")[name].double().square().sum()) for name in names}

    def cost(name: str, to: str) -> tuple[int, float]:
        tensor = weights[to if to in weights else "int4"][name]
        if to == "kept":
            return tensor.bytes_before, 0.0
        assert tensor.sqnr_db is not None
        return tensor.bytes_after, signal[name] / 10 ** (tensor.sqnr_db / 10)

    fixed = sum(t.bytes_before for t in weights["int4"].values() if t.name not in names)
    errors = []
    for spare in (2400, 4000, 9000):
        mixture = within_budget(*model, budget_bytes=fixed + spare, mixture=keep, **settings)
        report = quantize(source, tmp_path / str(spare), to="int4", granularity=PerGroup(16), mixture=mixture)
        assert report.bytes_after <= fixed + spare
        every = [
            [cost(name, to) for name, to in zip(names, ways, strict=True)]
            for ways in itertools.product(("int4", "int8", "kept"), repeat=4)
        ]
        least = min(sum(e for _, e in picked) for picked in every if sum(n for n, _ in picked) <= spare)
        errors.append(sum(cost(name, mixture.chosen[name])[1] for name in names))
        assert errors[-1] == pytest.approx(least, rel=1e-6)
    assert errors[0] > errors[1] > errors[2] > 0
    with pytest.raises(DoesNotFitError, match="missing"):
        within_budget(*model, budget_bytes=fixed, mixture=keep, **settings)


def test_keeping_alone_keeps_the_layout(tiny: Maker, tmp_path: Path) -> None:
    """INT8 by channel with some weights kept is still int-quantized, and they are named as left alone."""
    source, output = tiny("llama"), tmp_path / "output"
    quantize(source, output, to="int8", mixture=Mixture(keep=("*.layers.0.*",)))
    settings = json.loads((output / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "int-quantized" and "model.layers.0.mlp.up_proj" in settings["ignore"]
    before, after = (load_file(path / "model.safetensors") for path in (source, output))
    for name in before:
        assert torch.equal(before[name], after[name]) == (".layers.1." not in name or before[name].dim() == 1)


def test_what_cannot_be_mixed_is_refused(tiny: Maker, tmp_path: Path) -> None:
    """Formats that no reader takes side by side, patterns without a match, and mixtures of floats."""
    source, output = tiny("llama"), tmp_path / "output"
    for text in ("*.weight=nf4", "*.weight", "=int8", "re:(a+)+=int8"):
        with pytest.raises(UsageError):
            parse_mixture(keep=(), formats=[text])
    with pytest.raises(UsageError, match="in decoders alone"):
        some = parse_mixture(keep=(), formats=["*.wo.weight=int8"])
        quantize(tiny("t5"), output, to="int4", granularity=PerGroup(16), mixture=some)
    with pytest.raises(UsageError, match="matches none"):
        quantize(source, output, to="int8", mixture=Mixture(keep=("*.bias",)))
    with pytest.raises(UsageError, match="are for int8 and int4"):
        quantize(source, output, to="bf16", mixture=Mixture(keep=("*",)))
    with pytest.raises(UsageError, match=r"no weight|nothing"):
        quantize(source, output, to="int8", mixture=Mixture(keep=("*",)))
    assert main(["quantize", str(source), "--to", "int4", "--granularity", "group:16", "--output", str(output),
                 "--budget", "40KiB", "--format", "*=int8"]) == 2  # fmt: skip
    assert not output.exists()
    assert main(["quantize", str(source), "--to", "int4", "--granularity", "group:16", "--output", str(output),
                 "--budget", "40KiB", "--keep", "*.o_proj.*"]) == 0  # fmt: skip
    assert json.loads((output / "quantization_report.json").read_text())["totals"]["bytes_after"] <= 40 * 1024
