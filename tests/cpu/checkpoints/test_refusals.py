"""What `quantize` will not do: each bad input with its words and its exit code, and nothing left behind."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from brim.checkpoints import convert, stream, workplace
from brim.checkpoints.writer import write_at
from brim.cli import main

Maker = Callable[..., Path]
Captured = pytest.CaptureFixture[str]
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def source(tiny: Maker) -> Path:
    return tiny("llama")


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """After every test: no output, whole or partial."""
    yield
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name or path.name == "output"]


def refused(arguments: list[str], code: int, capsys: Captured) -> str:
    """The one line on stderr that a refusal ends with; stdout is empty."""
    capsys.readouterr()
    assert main(["quantize", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    *progress, line = captured.err.splitlines()
    assert all(said.startswith(("preparing", "quantizing")) for said in progress)
    assert line.startswith("brim: ")
    return line


def change(source: Path, name: str, edit: Callable[[Tensor], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("to", ["int8", "fp16", "bf16"])
@pytest.mark.parametrize(("value", "said"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight", "model.embed_tokens.weight"])
def test_what_is_no_number_is_refused(
    name: str, value: float, said: str, to: str, source: Path, tmp_path: Path, capsys: Captured
) -> None:
    """One NaN or Inf in any tensor, converted or not, is refused with file, tensor and index."""
    place = (5,) if name == "model.norm.weight" else (5, 7)
    change(source, name, lambda tensor: tensor.__setitem__(place, value))
    line = refused([str(source), "--to", to, "--output", str(tmp_path / "output")], 4, capsys)
    assert f"model.safetensors: tensor '{name}' holds {said} at index {list(place)}" in line


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_each_float_dtype_is_looked_at(dtype: torch.dtype, source: Path, tmp_path: Path, capsys: Captured) -> None:
    """NaN is found in each dtype that has it, at its place in a tensor of any number of dimensions."""
    tensors = load_file(source / "model.safetensors")
    tensors["extra"] = torch.ones(2, 3, 4)
    tensors["extra"][1, 2, 3] = float("nan")
    tensors["extra"] = tensors["extra"].to(dtype)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    line = refused([str(source), "--to", "int8", "--output", str(tmp_path / "output")], 4, capsys)
    assert "tensor 'extra' holds nan at index [1, 2, 3]" in line


def test_large_sums_are_no_inf(source: Path, tmp_path: Path) -> None:
    """Values whose sum leaves the dtype's range are finite all the same."""
    change(source, "model.norm.weight", lambda tensor: tensor.fill_(3e38))
    assert main(["quantize", str(source), "--to", "int8", "--output", str(tmp_path / "fine")]) == 0


@pytest.mark.parametrize(
    ("to", "value", "advice"),
    [("fp16", 65520.0, "use --to bf16"), ("fp16", -1e6, "use --to bf16"), ("bf16", 3.4e38, "leave the model")],
)
def test_overflow_names_the_count_and_the_way_out(
    to: str, value: float, advice: str, source: Path, tmp_path: Path, capsys: Captured
) -> None:
    """Values that would become Inf are counted, with the largest and what to do instead; just below, all is well."""
    change(source, WEIGHT, lambda tensor: tensor[3:5, 0].fill_(value))
    line = refused([str(source), "--to", to, "--output", str(tmp_path / "output")], 4, capsys)
    assert f"tensor '{WEIGHT}': 2 values are past the largest of {to.upper()}" in line
    assert f"(the largest is {abs(value):g})" in line
    assert advice in line
    change(source, WEIGHT, lambda tensor: tensor[3:5, 0].fill_(65519.0))
    assert main(["quantize", str(source), "--to", to, "--output", str(tmp_path / "fine")]) == 0


def test_double_past_single_is_overflow(tiny: Maker, tmp_path: Path, capsys: Captured) -> None:
    """INT8 of an FP64 weight that FP32 cannot hold is refused, not clipped."""
    source = tiny("untied", dtype=torch.float64)
    change(source, WEIGHT, lambda tensor: tensor.__setitem__((0, 0), 1e300))
    assert "1 values are past" in refused(
        [str(source), "--to", "int8", "--output", str(tmp_path / "output")], 4, capsys
    )


def test_an_output_that_exists_is_refused(source: Path, tmp_path: Path, capsys: Captured) -> None:
    """A directory with something in it, a file, and a link are refused untouched; an empty directory is taken."""
    taken, file, empty = tmp_path / "taken", tmp_path / "file", tmp_path / "empty"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("taken", "file", "link", "dangling"):
        line = refused([str(source), "--to", "bf16", "--output", str(tmp_path / name)], 2, capsys)
        assert f"{name} exists already" in line
    assert ((taken / "mine").read_text(), file.read_text(), list(empty.iterdir())) == ("mine", "mine", [])
    assert main(["quantize", str(source), "--to", "bf16", "--output", str(empty)]) == 0
    assert (empty / "model.safetensors").exists()


def test_the_model_itself_is_no_output(source: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and model may not be one directory, however each is spelt."""
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    monkeypatch.chdir(source.parent)
    for spelt in (str(source), "llama", "./llama/../llama/"):
        assert "is the model itself" in refused(["./llama", "--to", "bf16", "--output", spelt], 2, capsys)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"load_in_8bit": True}, "quantization_config"),
        ("quantization_config", "awq", "quantization_config"),
        ("compression_config", {"format": "pack-quantized"}, "compression_config"),
        ("text_config", {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_a_quantized_model_is_refused(
    key: str, value: Any, said: str, source: Path, tmp_path: Path, capsys: Captured
) -> None:
    """A config that says in any of the known ways that its weights are quantized is refused with that word."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: value}))
    for to in ("int8", "bf16"):
        line = refused([str(source), "--to", to, "--output", str(tmp_path / "output")], 2, capsys)
        assert f"is quantized already ({said})" in line


def test_our_own_output_is_refused(source: Path, tmp_path: Path, capsys: Captured) -> None:
    """What was quantized is not quantized again, even where its config has lost the word."""
    once = tmp_path / "once"
    assert main(["quantize", str(source), "--to", "int8", "--output", str(once)]) == 0
    arguments = [str(once), "--to", "int8", "--output", str(tmp_path / "output")]
    assert "quantized already (compressed-tensors)" in refused(arguments, 2, capsys)
    config = json.loads((once / "config.json").read_text())
    del config["quantization_config"]
    (once / "config.json").write_text(json.dumps(config))
    assert "quantized already (it holds model.layers.0" in refused(arguments, 2, capsys)


def test_nothing_to_do_is_said(tiny: Maker, tmp_path: Path, capsys: Captured) -> None:
    """BF16 to BF16, and a directory without weights, are refused with what is the matter."""
    source = tiny("llama", dtype=torch.bfloat16)
    arguments = [str(source), "--to", "bf16", "--output", str(tmp_path / "output")]
    assert "nothing that is not BF16 already" in refused(arguments, 2, capsys)
    (source / "model.safetensors").unlink()
    assert "no weights" in refused(arguments, 2, capsys)


def test_a_damaged_file_is_refused(source: Path, tmp_path: Path, capsys: Captured) -> None:
    """A safetensors file that breaks a rule is refused with file, offset and rule."""
    path = source / "model.safetensors"
    whole = path.read_bytes()
    arguments = [str(source), "--to", "int8", "--output", str(tmp_path / "output")]
    for damaged, rule in ((whole[:-4], "cut short"), (whole + b"x", "1 bytes follow"), (whole[:4], "too few")):
        path.write_bytes(damaged)
        line = refused(arguments, 4, capsys)
        assert "model.safetensors: at byte " in line
        assert rule in line


@pytest.mark.parametrize("to", ["int3", "gguf", ""])
def test_an_unknown_format_lists_the_known(to: str, source: Path, tmp_path: Path, capsys: Captured) -> None:
    """A format that there is not is refused with those that there are; capitals do not matter."""
    assert "formats: fp32, fp16, bf16, int8, int4, fp8, fp8_e5m2, mxfp4, nf4" in refused(
        [str(source), "--to", to], 2, capsys
    )
    assert main(["quantize", str(source), "--to", "BF16", "--output", str(tmp_path / "fine")]) == 0


def test_an_unknown_family_is_named(source: Path, tmp_path: Path, capsys: Captured) -> None:
    """INT8 needs the model's modules; a family that transformers does not know is named. Casts need none."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "llamma"}))
    arguments = [str(source), "--output", str(tmp_path / "output"), "--to", "int8"]
    assert "no family 'llamma'" in refused(arguments, 2, capsys)
    assert main(["quantize", str(source), "--to", "bf16", "--output", str(tmp_path / "fine")]) == 0


def test_a_small_disk_is_refused_before_writing(
    source: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk lacks the room, that is said before a byte is written, with what is missing."""
    usage = shutil.disk_usage(tmp_path)._replace(free=2**10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(workplace, "create", None)
    line = refused([str(source), "--to", "int8", "--output", str(tmp_path / "output")], 3, capsys)
    assert "are missing" in line


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_runs_full_leaves_nothing(
    kind: int, source: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk or quota that runs full in the middle of writing ends with 3 and the output's name; nothing is kept."""
    written = list[int]()

    def full(descriptor: int, view: memoryview, offset: int) -> None:
        written.append(offset)
        if len(written) > 5:
            raise OSError(kind, "No space left on device")
        write_at(descriptor, view, offset)

    monkeypatch.setattr(stream, "write_at", full)
    line = refused([str(source), "--to", "int8", "--output", str(tmp_path / "output")], 3, capsys)
    assert "output: the disk ran full" in line
    assert len(written) >= 6


def test_a_disk_that_lies_is_found_out(
    source: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads back other than it was written is refused with the tensor's name."""

    def lying(*arguments: Any, **options: Any) -> None:
        stream.convert(*arguments, **options)
        with (tmp_path / ".output.partial" / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 1]))

    monkeypatch.setattr(convert, "convert", lying)
    line = refused([str(source), "--to", "int8", "--output", str(tmp_path / "output")], 4, capsys)
    assert "came back from the disk other than it was written" in line
