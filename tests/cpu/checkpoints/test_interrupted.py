"""A conversion that is cut off leaves nothing that looks whole, and one that runs holds no more than a tile."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from brim.checkpoints import stream
from brim.checkpoints.convert import _Collected, quantize
from brim.cli import main
from brim.errors import ModelFileError, UsageError
from brim.publish import whole_directory

Maker = Callable[..., Path]


def test_ctrl_c_leaves_nothing(tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a tensor ends with 130, and of the output there is no trace."""
    source = tiny("llama")
    calls = iter(range(100))

    def interrupted(self: object, nbytes: int) -> None:
        if next(calls) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Collected, "count", interrupted)
    assert main(["quantize", str(source), "--to", "int8", "--output", str(tmp_path / "output")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


# Says that it is half-way and waits there to be killed.
KILLED = """
import sys, time
from pathlib import Path
from brim.checkpoints import stream
from brim.checkpoints.convert import quantize

def progress(done, total):
    if 2 * done >= total:
        print("half", flush=True)
        time.sleep(600)

stream.FLUSH_S = -1.0
quantize(Path(sys.argv[1]), Path(sys.argv[2]), to="int8", progress=progress)
"""


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def killed_half_way(source: Path, output: Path) -> None:
    """A run that got SIGKILL when half of its chunks had been collected."""
    run = subprocess.Popen([sys.executable, "-c", KILLED, source, output], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "half\n"
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    run.stdout.close()


@pytest.fixture(scope="module")
def killed(model_in: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a model and what a killed run left of its INT8 form."""
    place = tmp_path_factory.mktemp("killed")
    killed_half_way(model_in("llama", place / "llama"), place / "out[1]*")
    return place


@pytest.fixture
def place(killed: Path, tmp_path: Path) -> Path:
    """A copy of it, file times included."""
    return shutil.copytree(killed, tmp_path / "place")


def test_a_killed_run_leaves_nothing_visible(place: Path) -> None:
    """After SIGKILL half-way there is no output of any name that is listed. A run that resumes gives, byte by byte,
    what an undisturbed one gives, and does not do again what was done."""
    output, source = place / "out[1]*", place / "llama"
    assert {path.name for path in place.iterdir()} == {"llama", ".out[1]*.partial", ".out[1]*.lock"}
    chunks = list[object]()

    def counted(*arguments: Any) -> object:
        chunks.append(arguments)
        return converted(*arguments)

    converted = stream._convert
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_convert", counted)
        quantize(source, output, to="int8", resume=True)
        resumed = len(chunks)
        quantize(source, place / "undisturbed", to="int8", resume=True)
    assert 0 < resumed < len(chunks) - resumed
    assert contents(output) == contents(place / "undisturbed")
    assert {path.name for path in place.iterdir()} == {"llama", "out[1]*", "undisturbed"}


def test_without_resuming_it_starts_over(place: Path) -> None:
    """What a killed run left is removed by the next of that name, which gives the same output."""
    quantize(place / "llama", place / "out[1]*", to="bf16")
    quantize(place / "llama", place / "undisturbed", to="bf16")
    assert contents(place / "out[1]*") == contents(place / "undisturbed")


def test_other_work_is_not_gone_on_with(place: Path) -> None:
    """A killed run is resumed under the same settings and on the same files only; the refusal leaves it as it is."""
    source, output, partial = place / "llama", place / "out[1]*", place / ".out[1]*.partial"
    before = contents(partial)
    with pytest.raises(UsageError, match=r"partial is a killed run of another model.*without --resume"):
        quantize(source, output, to="bf16", resume=True)
    os.utime(source / "model.safetensors", ns=(0, 0))
    with pytest.raises(UsageError, match="killed run of another model"):
        quantize(source, output, to="int8", resume=True)
    assert contents(partial) == before


def test_a_torn_journal_is_gone_on_from(place: Path) -> None:
    """The last line of a journal may have been cut anywhere: what it was of is done again."""
    journal = place / ".out[1]*.partial" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:9])
    quantize(place / "llama", place / "out[1]*", to="int8", resume=True)
    quantize(place / "llama", place / "undisturbed", to="int8")
    assert contents(place / "out[1]*") == contents(place / "undisturbed")


def test_damage_to_a_killed_run_is_found(place: Path) -> None:
    """Bytes that changed since the journal vouched for them are found before anything is published."""
    with (place / ".out[1]*.partial" / "model.safetensors").open("r+b") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        file.seek(begin)
        first = file.read(1)
        file.seek(begin)
        file.write(bytes([first[0] ^ 1]))
    with pytest.raises(ModelFileError, match="came back from the disk other"):
        quantize(place / "llama", place / "out[1]*", to="int8", resume=True)
    assert [path.name for path in place.iterdir()] == ["llama"]


def test_one_run_at_a_time(tiny: Maker, tmp_path: Path) -> None:
    """While a run makes an output, a second is refused and does it no harm; other outputs are free."""
    source, output = tiny("llama"), tmp_path / "output"
    refusals = list[str]()

    def second(done: int, total: int) -> None:
        if not refusals:
            with pytest.raises(UsageError, match="another run is writing") as caught:
                quantize(source, output, to="bf16")
            refusals.append(str(caught.value))
            quantize(source, tmp_path / "other", to="bf16")

    quantize(source, output, to="int8", progress=second)
    assert refusals
    quantize(source, tmp_path / "undisturbed", to="int8")
    assert contents(output) == contents(tmp_path / "undisturbed")
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "output", "other", "undisturbed"}


def test_ctrl_c_of_long_work_keeps_it(
    tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C once the journal has something ends with 75 and says how to go on; going on gives the same output."""
    source, output = tiny("llama"), tmp_path / "output"
    command = ["quantize", str(source), "--to", "int8", "--output", str(output)]
    calls = iter(range(100))

    def interrupted(self: object, nbytes: int) -> None:
        if next(calls) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stream, "FLUSH_S", -1.0)
        patch.setattr(_Collected, "count", interrupted)
        assert main(command) == 75
    assert "--resume goes on" in capsys.readouterr().err
    assert not output.exists()
    assert main([*command, "--resume", "--memory", "64MiB"]) == 0
    quantize(source, tmp_path / "undisturbed", to="int8")
    assert contents(output) == contents(tmp_path / "undisturbed")


def test_too_little_memory_is_refused(tiny: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where not even one worker fits, that is said with the tensor, before anything is made."""
    command = ["quantize", str(tiny("llama")), "--to", "int8", "--output", str(tmp_path / "output")]
    assert main([*command, "--memory", "1MiB"]) == 3
    assert "--memory allows 1.00 MiB" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_leftovers_of_others_stay(tmp_path: Path) -> None:
    """Only what a killed run left of this very name is removed, whatever characters the name has."""
    for other in (".outer.partial", ".out1.partial"):
        (tmp_path / other).mkdir()
    with whole_directory(tmp_path / "out?") as directory:
        (directory / "file").write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out?", ".outer.partial", ".out1.partial"}


# A model of one layer whose tensors are zeros that take no disk: (inputs x outputs) of one linear weight as given.
MEASURED = """
import json, sys
from pathlib import Path
from transformers import LlamaConfig
from brim.checkpoints.convert import quantize
from brim.checkpoints.writer import header_bytes
from brim.models.safetensors_header import LENGTH_BYTES
from brim.models.skeleton import skeleton
from brim.models.spec import ModelSpec, TensorSpec
import torch

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])

def model(directory, intermediate):
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=intermediate, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    config.save_pretrained(directory)
    spec = ModelSpec(name="zeros", kind="directory", config=config.to_dict(), num_parameters=0, tied_head=True)
    with torch.device("meta"):
        parameters = skeleton(spec, dtype="fp32", attention="eager").named_parameters()
    tensors = [TensorSpec(name=n, shape=tuple(p.shape), dtype="fp32", nbytes=4 * p.numel()) for n, p in parameters]
    header = header_bytes(tensors)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(tensor.nbytes for tensor in tensors))
    return directory

root = Path(sys.argv[1])
peaks = []
for name, intermediate in (("small", 2**16), ("large", 2**19)):
    (root / name).mkdir()
    quantize(model(root / name, intermediate), root / f"{name}-int8", to="int8")
    peaks.append(peak_bytes())
print(json.dumps({"peaks": peaks, "bytes": (root / "large" / "model.safetensors").stat().st_size}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of peak memory")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model eight times as large, with tensors of 128 MiB, takes at most 32 MiB (8 tiles) more than the small one."""
    # One thread: each new one brings a stack and an arena of its own.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    measured = json.loads(done.stdout)
    small, large = measured["peaks"]
    assert measured["bytes"] > 3 * 2**27
    assert large - small <= 32 * 2**20
