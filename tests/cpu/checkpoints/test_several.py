"""Several outputs from one pass: each is what a run of its own gives, and all of them appear or none."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from brim.checkpoints import stream
from brim.checkpoints.convert import audit_all, quantize, quantize_all
from brim.checkpoints.reader import read_into
from brim.checkpoints.targets import Family, Target, Wanted, wanted_of
from brim.checkpoints.writer import write_at
from brim.cli import main
from brim.errors import DoesNotFitError, ModelFileError, UsageError

Maker = Callable[..., Path]
Captured = pytest.CaptureFixture[str]
WANTED = (
    Wanted("int8"), Wanted("int8", "bitsandbytes"), Wanted("q4_0"), Wanted("mxfp4"),
)  # fmt: skip


def contents(directory: Path) -> dict[str, bytes]:
    """Of all files below, by their paths."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_each_is_what_a_run_of_its_own_gives(tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of every output is, byte by byte, that of a run for it alone, cut into many blocks too; each byte of
    the source's weights is read once."""
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 2**11)
    source = tiny("llama", dtype=torch.bfloat16)
    read = list[int]()

    def counted(descriptor: int, left: memoryview, *arguments: Any) -> None:
        read.append(len(left))
        read_into(descriptor, left, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "read_into", counted)
        reports = quantize_all(source, tmp_path / "all", WANTED)
    assert sum(read) == reports[0].bytes_before
    assert {path.name for path in (tmp_path / "all").iterdir()} == {each.name for each in WANTED}
    for each, report in zip(WANTED, reports, strict=True):
        alone = quantize(source, tmp_path / each.name, to=each.to, layout=each.layout)
        assert alone.layout == report.layout
        found, expected = contents(tmp_path / "all" / each.name), contents(tmp_path / each.name)
        # GGUF's heads make larger blocks for all: sums are then added in another order.
        sums, alone_sums = (json.loads(files.pop("quantization_report.json")) for files in (found, expected))
        assert found == expected
        assert sums["totals"] == pytest.approx(alone_sums["totals"])
    looked = audit_all(source, WANTED)
    assert looked == reports
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "all", *(each.name for each in WANTED)}


def test_what_lies_transposed_is_read_for_each_order(tiny: Maker, tmp_path: Path) -> None:
    """bitsandbytes reads GPT-2's weights by column, plain floats by row: both are right."""
    source = tiny("gpt2")
    quantize_all(source, tmp_path / "all", (Wanted("int8", "bitsandbytes"), Wanted("fp16")))
    for to, layout in (("int8", "bitsandbytes"), ("fp16", "plain")):
        quantize(source, tmp_path / to, to=to, layout=layout)  # type: ignore[arg-type]
        assert contents(tmp_path / "all" / f"{to}-{layout}") == contents(tmp_path / to)


def test_a_resumed_run_gives_the_same(tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends half-way leaves nothing visible; one that goes on gives every output byte by byte and does not do
    again what was done; one with other outputs is refused."""
    source, output, wanted = tiny("llama"), tmp_path / "all", WANTED[:3]
    convert, calls = stream._convert, list[int]()

    def counted(*arguments: Any, stop: int) -> Any:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return convert(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_convert", partial(counted, stop=0))
        quantize_all(source, tmp_path / "undisturbed", wanted)
        whole = len(calls)
        patch.setattr(stream, "FLUSH_S", -1.0)
        patch.setattr(stream, "_convert", partial(counted, stop=whole + whole // 2))
        command = ["quantize", str(source), "--to", "int8", "--to", "q4_0", *layouts(wanted), "--output", str(output)]
        assert main(command) == 75
        assert not output.exists()
        with pytest.raises(UsageError, match="killed run of another model"):
            quantize_all(source, output, wanted[:2], resume=True)
        calls.clear()
        patch.setattr(stream, "_convert", partial(counted, stop=0))
        quantize_all(source, output, wanted, resume=True)
    assert 0 < len(calls) <= whole - whole // 2 + 1
    assert contents(output) == contents(tmp_path / "undisturbed")
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "all", "undisturbed"}


def layouts(wanted: tuple[Wanted, ...]) -> list[str]:
    names = {"compressed-tensors", "gguf", *(each.layout for each in wanted if each.layout)}
    return [part for name in sorted(names) for part in ("--layout", name)]


def test_one_that_fails_leaves_none(tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one output cannot be made (FP16 overflows), where one comes back from the disk changed, or where the memory
    is too small for all of them together, none is left."""
    source, output = tiny("llama"), tmp_path / "all"
    large = tiny("untied", dtype=torch.float32)
    tensors = torch.full((4,), 1e6)
    path = large / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 16)
        file.write(tensors.numpy().tobytes())
    with pytest.raises(ModelFileError, match="past the largest of FP16"):
        quantize_all(large, output, (Wanted("int8"), Wanted("fp16")))
    with pytest.raises(DoesNotFitError, match="--memory allows"):
        quantize_all(source, output, WANTED, memory_bytes=2**20)

    def changed(descriptor: int, left: memoryview, offset: int) -> None:
        write_at(descriptor, left, offset)
        if len(left) == 48 * 32:
            os.pwrite(descriptor, b"\x55\x55", offset)

    monkeypatch.setattr(stream, "write_at", changed)
    with pytest.raises(ModelFileError, match="came back from the disk other than it was written"):
        quantize_all(source, output, (Wanted("bf16"), Wanted("int8")))
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "untied"}


@pytest.mark.parametrize(
    ("targets", "layouts", "names"),
    [
        (["int8"], [], ["int8-compressed-tensors"]),
        (["int8"], ["torchao", "compressed-tensors"], ["int8-compressed-tensors", "int8-torchao"]),
        (["int8", "int4"], [], ["int8-compressed-tensors", "int4-compressed-tensors"]),
        (["int8", "q8_0"], ["torchao", "gguf"], ["int8-torchao", "q8_0-gguf"]),
        (["int8", "q8_0"], ["torchao"], "layout torchao does not hold q8_0"),
        (["int8"], ["torchao", "gguf"], "layout gguf does not hold int8"),
        (["int8", "int8"], [], "names something twice"),
    ],
)
def test_which_outputs_are_meant(targets: list[Target], layouts: list[Family], names: list[str] | str) -> None:
    """Each format in each layout that holds it; a format or layout that is for nothing is refused."""
    if isinstance(names, str):
        with pytest.raises(UsageError, match=names):
            wanted_of(targets, layouts)
    else:
        assert [each.name for each in wanted_of(targets, layouts)] == names


def test_the_verb_tells_of_each(tiny: Maker, tmp_path: Path, capsys: Captured) -> None:
    """A table for each output, a hint for each, and in JSON a report for each by the name of its directory; what is for
    one output alone is refused."""
    source, output = str(tiny("llama")), str(tmp_path / "all")
    command = ["quantize", source, "--to", "int8", "--to", "q8_0", "--output", output]
    assert main([*command, "--plot", str(tmp_path / "p.png")]) == 2
    assert "--plot is for one output" in capsys.readouterr().err
    assert main(["quantize", source, "--to", "int8", "--to", "q8_0", "--audit", "--json"]) == 0
    audited = json.loads(capsys.readouterr().out)
    assert audited["output"] is None and list(audited["outputs"]) == ["int8-compressed-tensors", "q8_0-gguf"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "int8-compressed-tensors:" in captured.out and "q8_0-gguf:" in captured.out
    assert f"brim evaluate {output}/q8_0-gguf/model.gguf" in captured.err
    saved = json.loads((tmp_path / "all" / "q8_0-gguf" / "quantization_report.json").read_text())
    assert audited["outputs"]["q8_0-gguf"] == saved
