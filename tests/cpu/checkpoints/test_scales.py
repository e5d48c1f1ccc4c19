"""`--scales`: what a model's files hold when scales are searched, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from brim.checkpoints.convert import quantize
from brim.checkpoints.targets import Target
from brim.cli import main
from brim.errors import UsageError
from brim.numerics.granularity import PerGroup

Maker = Callable[..., Path]


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_searched_scales_are_in_the_same_layout_with_less_noise(to: Target, tiny: Maker, tmp_path: Path) -> None:
    """Same tensors, shapes and dtypes as with absmax, no tensor with less signal to noise, and transformers loads
    it: its logits are off by no more than the format's steps can make them."""
    source = tiny("llama")
    granularity = PerGroup(16) if to == "int4" else None
    reports = {
        scales: quantize(source, tmp_path / scales, to=to, granularity=granularity, scales=scales)
        for scales in ("absmax", "mse")
    }
    absmax, mse = (load_file(tmp_path / scales / "model.safetensors") for scales in reports)
    assert {name: (t.shape, t.dtype) for name, t in absmax.items()} == {n: (t.shape, t.dtype) for n, t in mse.items()}
    pairs = zip(reports["absmax"].converted, reports["mse"].converted, strict=True)
    assert all((fewer.sqnr_db or 0) >= (plain.sqnr_db or 0) for plain, fewer in pairs)
    tokens = torch.arange(32).reshape(2, 16)
    with torch.inference_mode():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path, dtype="auto")(tokens).logits
            for path in (source, tmp_path / "mse")
        )
    assert float((after - before).norm() / before.norm()) < (0.01 if to == "int8" else 0.1)


def test_the_report_is_of_what_was_written(tiny: Maker, tmp_path: Path) -> None:
    """The largest error in the report is that of the codes and scales in the file, unpacked by compressed-tensors."""
    source, output = tiny("llama"), tmp_path / "output"
    report = quantize(source, output, to="int4", granularity=PerGroup(16), scales="mse")
    before, after = (load_file(path / "model.safetensors") for path in (source, output))
    for tensor in report.converted:
        shape = torch.Size(after[f"{tensor.name}_shape"].tolist())
        codes = unpack_from_int32(after[f"{tensor.name}_packed"], 4, shape)
        decoded = codes * after[f"{tensor.name}_scale"].repeat_interleave(16, dim=1)
        assert float((decoded - before[tensor.name]).abs().max()) == pytest.approx(tensor.largest_error, rel=1e-6)
        assert tensor.clipped_share > 0 or tensor.largest_error < 1


def test_scales_for_floats_and_unknown_ones_are_refused(tiny: Maker, tmp_path: Path) -> None:
    """A choice of scales has no effect on floats, and only known ones are taken."""
    source = tiny("llama")
    with pytest.raises(UsageError, match="for integers"):
        quantize(source, tmp_path / "output", to="bf16", scales="mse")
    assert main(["quantize", str(source), "--to", "int8", "--scales", "best"]) == 2
    assert not (tmp_path / "output").exists()
