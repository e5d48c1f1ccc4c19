"""FP32 -> INT8 per channel on a checkpoint in the page cache: against copying, and against other tools, in one run.

Copying is: read the file in, write a quarter of it out, force that to the disk; as much I/O as the conversion has,
which ends on the disk too. The other tools get the same tensors, from safetensors to safetensors, each in an
environment of its own, pinned; one that cannot be installed is named and skipped. Gigabytes by `BRIM_BENCH_GB` (4).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import torch
from transformers import LlamaConfig

from brim.checkpoints.convert import quantize
from brim.checkpoints.writer import bytes_of, create, safetensors_file, write_at
from brim.models.skeleton import skeleton
from brim.models.spec import ModelSpec, TensorSpec

ROUNDS = 3
GB = 10**9
PEERS = {
    "torchao": "torchao==0.18.0",
    "compressed-tensors": "compressed-tensors==0.20.0",
    "bitsandbytes": "bitsandbytes==0.50.2",
    "gguf": "gguf==0.19.0",
}
PEER_GB = 1
"""Others get a smaller checkpoint of the same layers, as does Brim beside them: they take long."""


def synthetic(directory: Path, nbytes: int) -> Path:
    """Layers of Llama-2-7B with random weights, as many as fill this size."""
    hidden, intermediate = 4096, 11008
    layers = max(1, round(nbytes / (4 * (4 * hidden**2 + 3 * hidden * intermediate))))
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(directory)
    spec = ModelSpec(name="synthetic", kind="directory", config=config.to_dict(), num_parameters=0, tied_head=True)
    with torch.device("meta"):
        parameters = list(skeleton(spec, dtype="fp32", attention="eager").named_parameters())
    tensors = [TensorSpec(name=n, shape=tuple(p.shape), dtype="fp32", nbytes=4 * p.numel()) for n, p in parameters]
    file = safetensors_file("model.safetensors", tensors)
    create(directory / file.name, file, {})
    torch.manual_seed(0)
    values = torch.randn(2**24).mul_(0.02)
    descriptor = os.open(directory / file.name, os.O_WRONLY)
    for tensor in file.tensors:
        for first in range(0, tensor.numel, values.numel()):
            part = values[: min(values.numel(), tensor.numel - first)]
            write_at(descriptor, bytes_of(part), file.places[tensor.name] + 4 * first)
    os.close(descriptor)
    return directory


def copy(source: Path, output: Path) -> None:
    """All bytes in, a quarter out, on the disk at the end."""
    output.mkdir()
    buffer = memoryview(bytearray(2**20))
    with (source / "model.safetensors").open("rb", buffering=0) as reading, (output / "x").open("wb", 0) as writing:
        while got := reading.readinto(buffer):
            writing.write(buffer[: got // 4])
        os.fsync(writing.fileno())


def seconds(work: object, source: Path, place: Path) -> float:
    """Of `work` into a fresh directory."""
    assert callable(work)
    output = place / "output"
    started = time.perf_counter()
    work(source, output)
    elapsed = time.perf_counter() - started
    shutil.rmtree(output)
    return elapsed


def ours(source: Path, output: Path) -> None:
    quantize(source, output, to="int8")


def peer_seconds(name: str, source: Path, place: Path) -> float | str:
    """Of the conversion alone, without the start of its process; or why there is none."""
    home = place / name
    # Its own packages come first; torch and safetensors are those of this environment.
    venv.create(home, system_site_packages=False, with_pip=True)
    python = home / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", PEERS[name]], capture_output=True, text=True
    )
    if installed.returncode:
        return f"{PEERS[name]} cannot be installed here"
    (shared,) = (path for path in sys.path if path.endswith("site-packages"))
    script = Path(__file__).with_name("quantize_peer.py")
    command = [str(part) for part in (python, script, name, source / "model.safetensors", place / "peer.out")]
    own = next((home / "lib").glob("python*/site-packages"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(own), shared))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    (place / "peer.out").unlink(missing_ok=True)
    shutil.rmtree(home)
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}"
    return float(done.stdout.split()[-1])


def main() -> None:
    size = float(os.environ.get("BRIM_BENCH_GB", "4"))
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        source = synthetic(place / "large", round(size * GB))
        nbytes = (source / "model.safetensors").stat().st_size
        pairs = [(seconds(copy, source, place), seconds(ours, source, place)) for _ in range(ROUNDS)]
        copy_s, ours_s = (min(times) for times in zip(*pairs, strict=True))
        print(
            f"quantize: copy {nbytes / copy_s / GB:.2f} GB/s, FP32 -> INT8 {nbytes / ours_s / GB:.2f} GB/s, "
            f"{copy_s / ours_s:.0%} of the rate of copying ({nbytes / GB:.1f} GB, best of {ROUNDS})"
        )
        shutil.rmtree(source)
        small = synthetic(place / "small", PEER_GB * GB)
        nbytes = (small / "model.safetensors").stat().st_size
        best_s = min(seconds(ours, small, place) for _ in range(ROUNDS))
        print(f"quantize: Brim {nbytes / best_s / GB:.2f} GB/s ({nbytes / GB:.1f} GB)")
        for name in PEERS:
            found = peer_seconds(name, small, place)
            said = found if isinstance(found, str) else f"{nbytes / found / GB:.2f} GB/s, Brim {found / best_s:.1f} x"
            print(f"quantize: {PEERS[name]} {said}")


if __name__ == "__main__":
    main()
