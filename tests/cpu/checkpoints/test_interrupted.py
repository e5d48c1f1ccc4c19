"""A conversion that is cut off leaves nothing that looks whole, and one that runs holds no more than a tile."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from brim.checkpoints.convert import _Collected, quantize
from brim.cli import main
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
from brim.checkpoints.convert import quantize

def progress(done, total):
    if 2 * done >= total:
        print("half", flush=True)
        time.sleep(600)

quantize(Path(sys.argv[1]), Path(sys.argv[2]), to="int8", progress=progress)
"""


@pytest.mark.parametrize("name", ["output", "out[1]*"])
def test_a_killed_run_leaves_nothing_visible(name: str, tiny: Maker, tmp_path: Path) -> None:
    """After SIGKILL half-way there is no output of any name that is listed; the next run removes what is hidden."""
    source, place = tiny("llama"), tmp_path / "place"
    output = place / name
    run = subprocess.Popen([sys.executable, "-c", KILLED, source, output], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "half\n"
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    run.stdout.close()
    assert {path.name for path in place.iterdir()} == {f".{name}.partial", f".{name}.lock"}
    quantize(source, output, to="int8")
    assert list(place.iterdir()) == [output]
    assert load_file(output / "model.safetensors")


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
