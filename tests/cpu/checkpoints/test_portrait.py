"""Pictures of one weight before and after: the elements are those of the file and of what a reader sees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from brim.checkpoints import portrait as module
from brim.checkpoints import stream
from brim.checkpoints.convert import quantize
from brim.checkpoints.portrait import portrait
from brim.checkpoints.targets import Wanted
from brim.cli import main
from brim.numerics.granularity import PerChannel, PerGroup, PerTensor

Maker = Callable[..., Path]
NAME = "model.layers.1.mlp.gate_proj.weight"
ASKED: dict[str, tuple[Wanted, dict[str, Any], int]] = {
    "int8": (Wanted("int8"), {}, 32),
    "int4 by group": (Wanted("int4"), {"granularity": PerGroup(16)}, 16),
    "int4, searched": (Wanted("int4"), {"scales": "mse", "granularity": PerGroup(8)}, 8),
    "int4, asymmetric": (Wanted("int4"), {"symmetric": False, "granularity": PerChannel()}, 32),
    "int8 by tensor": (Wanted("int8"), {"granularity": PerTensor()}, 32),
    "mxfp4": (Wanted("mxfp4"), {}, 32),
}


@pytest.mark.parametrize("asked", ASKED)
def test_elements_are_those_of_source_and_reader(
    asked: str, tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The elements before are the source's, those after are what transformers makes of the output, and the block is of
    those that share the scale of the largest; a larger tensor is sampled evenly, however it is cut."""
    wanted, settings, block_size = ASKED[asked]
    source = tiny("llama")
    before = load_file(source / "model.safetensors")[NAME].flatten()
    quantize(source, tmp_path / "output", to=wanted.to, layout=wanted.layout, **settings)
    parameters = AutoModelForCausalLM.from_pretrained(tmp_path / "output", dtype="auto").get_parameter(NAME)
    values: Any = parameters.data
    after: Tensor = values.flatten().float()
    asked_all: dict[str, Any] = {"granularity": None, "scales": "absmax", "symmetric": True, "memory_bytes": 2**29}
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 400)
    found = portrait(source, NAME, wanted=wanted, **(asked_all | settings))
    assert torch.equal(found.before, before) and torch.equal(found.after, after)
    place = int(before.abs().argmax()) // block_size * block_size
    assert torch.equal(found.block_before, before[place : place + block_size])
    assert torch.equal(found.block_after, after[place : place + block_size])
    monkeypatch.setattr(module, "SAMPLE", 500)
    sampled = portrait(source, NAME, wanted=wanted, **(asked_all | settings))
    stride = -(-len(before) // 500)
    assert torch.equal(sampled.before, before[::stride]) and torch.equal(sampled.after, after[::stride])


def test_the_verb_draws_it(tiny: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--tensor` adds two panels to the picture, with the tensor's name; a name that is not converted is refused with
    one that is near, and without a picture the option is refused."""
    source, picture = str(tiny("llama")), tmp_path / "losses.svg"
    command = ["quantize", source, "--to", "int4", "--granularity", "group:16", "--audit"]
    assert main([*command, "--plot", str(picture), "--tensor", NAME]) == 0
    drawn = picture.read_text()
    assert NAME in drawn and "share the scale" in drawn and "self_attn.q_proj" in drawn
    capsys.readouterr()
    assert main([*command, "--plot", str(picture), "--tensor", NAME.replace("gate", "gata")]) == 2
    assert f"did you mean {NAME}" in capsys.readouterr().err
    assert main([*command, "--tensor", NAME]) == 2
    assert "add --plot" in capsys.readouterr().err
