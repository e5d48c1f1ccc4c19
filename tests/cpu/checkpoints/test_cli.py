"""`brim quantize` as a user types it: what is on which stream, with and without a terminal."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from brim.checkpoints.convert import audit
from brim.cli import main
from brim.cli import quantize as verb
from brim.models import weights

Maker = Callable[..., Path]
Captured = pytest.CaptureFixture[str]


def test_json_is_all_there_is_on_stdout(tiny: Maker, tmp_path: Path, capsys: Captured) -> None:
    """`--json` prints one object: the report that lies beside the model, and what was asked, where it is, how long."""
    source, output = tiny("llama"), tmp_path / "output"
    capsys.readouterr()
    assert main(["quantize", str(source), "--to", "int8", "--output", str(output), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    saved = json.loads((output / "quantization_report.json").read_text())
    assert (result["schema"], result["model"], result["output"]) == (1, str(source), str(output))
    assert result.pop("seconds") > 0
    assert result == saved | {"model": str(source), "output": str(output)}
    assert set(saved["totals"]) == {
        "tensors", "converted", "bytes_before", "bytes_after", "converted_bytes_before", "converted_bytes_after",
        "worst_sqnr_db",
    }  # fmt: skip
    assert {tuple(tensor) for tensor in saved["tensors"]} == {(
        "name", "shape", "source_format", "format", "bytes_before", "bytes_after", "sqnr_db", "largest_error",
        "clipped_share", "zeroed_share", "scale_min", "scale_max", "largest", "outlier_ratio", "zero_rows",
        "subnormal_share",
    )}  # fmt: skip


def test_the_table_is_the_report(tiny: Maker, tmp_path: Path, capsys: Captured) -> None:
    """The table adds up, the worst tensors come in order; progress goes in tenths to stderr, a hint at its end."""
    source, output = tiny("untied"), tmp_path / "output"
    capsys.readouterr()
    assert main(["quantize", str(source), "--to", "int8", "--output", str(output)]) == 0
    captured = capsys.readouterr()
    saved = json.loads((output / "quantization_report.json").read_text())
    counts = dict(re.findall(r"^(to int8|kept as they were|all) +(\d+)", captured.out, flags=re.MULTILINE))
    assert int(counts["to int8"]) == 14
    assert int(counts["to int8"]) + int(counts["kept as they were"]) == int(counts["all"]) == len(saved["tensors"])
    worst = re.findall(r"^(\S+) +([\d.]+) dB", captured.out, flags=re.MULTILINE)
    lost = sorted((tensor for tensor in saved["tensors"] if tensor["sqnr_db"]), key=lambda tensor: tensor["sqnr_db"])
    assert [name for name, _ in worst] == [tensor["name"] for tensor in lost[:5]]
    lines = captured.err.splitlines()
    tenths = [
        int(match[1]) for line in lines if (match := re.fullmatch(r"quantizing .*: (\d+) %, [\d.]+ \wiB/s", line))
    ]
    assert tenths == sorted(set(tenths))
    assert tenths[-1] == 100
    assert lines[-1] == f"compare: brim evaluate {output} --baseline {source}"


def test_the_default_place_is_named_after_the_model(
    tiny: Maker, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `--output` the result is in the current directory, as MODEL-FORMAT; `.` is called by its real name."""
    source = tiny("llama")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["quantize", str(source), "--to", "bf16"]) == 0
    assert (tmp_path / "elsewhere" / "llama-bf16" / "model.safetensors").exists()
    monkeypatch.chdir(source)
    assert main(["quantize", ".", "--to", "fp16", "--output", "../named"]) == 0
    assert json.loads((tmp_path / "named" / "quantization_report.json").read_text())["model"] == "llama"
    capsys.readouterr()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m", "smollm2-135m"),
        ("Qwen/Qwen2.5-0.5B@main", "qwen2.5-0.5b"),
        ("models/Tiny.Q8_0.gguf", "tiny.q8_0"),
        ("models/llama/", "llama"),
    ],
)
def test_names_of_models(model: str, name: str) -> None:
    """A name, a Hub id with its revision, a file and a directory each give a plain name."""
    assert verb._short_name(model) == name


def test_a_bad_output_costs_no_preparation(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that exists is refused before weights are prepared or downloaded."""
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setattr(weights, "local_directory", lambda *_, **__: pytest.fail("prepared in vain"))
    assert main(["quantize", "smollm2-135m", "--to", "int8", "--output", str(tmp_path / "taken")]) == 2
    assert "exists already" in capsys.readouterr().err


def quantized(source: Path, output: Path, **streams: Any) -> subprocess.CompletedProcess[str]:
    """As from a shell, warnings shown as Python shows them by default."""
    command = [sys.executable, "-m", "brim.cli", "quantize", str(source), "--to", "int8", "--output", str(output)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    return subprocess.run(command, text=True, check=True, env={**environment, "TERM": "xterm"}, **streams)


def chatty(source: Path) -> Path:
    """A config that transformers has remarks on: ids that the vocabulary does not have, a key that nobody knows."""
    config = json.loads((source / "config.json").read_text())
    config |= {"bos_token_id": 50256, "eos_token_id": 50256, "own_key": 1, "torch_dtype": "float32"}
    (source / "config.json").write_text(json.dumps(config))
    return source


def test_without_a_terminal_lines_are_plain(tiny: Maker, tmp_path: Path) -> None:
    """Into a pipe go plain lines, none of them from a library, though transformers has remarks on this config."""
    done = quantized(chatty(tiny("llama")), tmp_path / "output", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert "\x1b" not in done.stdout + done.stderr
    ours = ("preparing ", "quantizing to int8", "compare: ")
    assert [line for line in done.stderr.splitlines() if not line.startswith(ours)] == []


def test_on_a_terminal_a_bar(tiny: Maker, tmp_path: Path) -> None:
    """On a terminal there is a bar in place of lines, and nothing that a library says."""
    ours, theirs = pty.openpty()
    done = quantized(chatty(tiny("llama")), tmp_path / "output", stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = ""
    while True:
        try:
            block = os.read(ours, 2**16)
        except OSError:  # Linux's way to say that the other end is closed
            break
        shown += block.decode()
    os.close(ours)
    assert "\x1b[" in shown
    assert "quantizing to int8" in shown
    assert " %\r\n" not in shown
    assert "transformers" not in shown
    assert "written to" in done.stdout


def test_an_audit_writes_nothing(tiny: Maker, tmp_path: Path, capsys: Captured) -> None:
    """`--audit` reports, tensor by tensor, what the conversion then reports; until then there is no file anywhere."""
    source = tiny("untied")
    capsys.readouterr()
    assert main(["quantize", str(source), "--to", "int8", "--audit", "--json"]) == 0
    audited = json.loads(capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["untied"]
    assert main(["quantize", str(source), "--to", "int8", "--output", str(tmp_path / "output")]) == 0
    saved = json.loads((tmp_path / "output" / "quantization_report.json").read_text())
    assert (audited["output"], audited["tensors"], audited["totals"]) == (None, saved["tensors"], saved["totals"])
    assert main(["quantize", str(source), "--to", "int8", "--audit"]) == 0
    assert "nothing was written" in capsys.readouterr().err
    assert main(["quantize", str(source), "--to", "int8", "--audit", "--resume"]) == 2


def test_the_audit_sees_what_is_odd(tiny: Maker, tmp_path: Path) -> None:
    """Zero rows, subnormal numbers, negative zeros and outliers are counted as numpy counts them, in each format."""
    source = tiny("untied")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    odd = tensors[name]
    odd[3:5] = 0.0
    odd[7, :4] = torch.tensor([1e-40, -1e-41, -0.0, 50.0])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        save_file(tensors | {name: odd.to(dtype)}, source / "model.safetensors", {"format": "pt"})
        report = audit(source, to="int8")
        found = next(tensor for tensor in report.tensors if tensor.name == name)
        values = odd.to(dtype).double().numpy()
        least = torch.finfo(dtype).smallest_normal
        assert found.zero_rows == 2
        assert found.subnormal_share == pytest.approx(((abs(values) < least) & (values != 0)).mean())
        assert found.largest == abs(values).max() == 50.0
        assert found.outlier_ratio == pytest.approx(50 / (values**2).mean() ** 0.5, rel=1e-5)
        kept = next(tensor for tensor in report.tensors if tensor.name == "model.embed_tokens.weight")
        embedding = tensors["model.embed_tokens.weight"].double().numpy()
        assert kept.largest == abs(embedding).max()
        assert kept.outlier_ratio == pytest.approx(abs(embedding).max() / (embedding**2).mean() ** 0.5, rel=1e-5)


def test_a_picture_shows_every_tensor(tiny: Maker, tmp_path: Path, capsys: Captured) -> None:
    """`--plot` draws each kind of converted tensor by name; a picture of another kind is refused beforehand."""
    source = str(tiny("untied"))
    assert main(["quantize", source, "--to", "int8", "--audit", "--plot", str(tmp_path / "losses.svg")]) == 0
    drawn = (tmp_path / "losses.svg").read_text()
    for kind in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        assert kind in drawn
    assert main(["quantize", source, "--to", "int8", "--audit", "--plot", str(tmp_path / "losses.gif")]) == 2
    assert "pictures are .svg or .png" in capsys.readouterr().err
