"""PyTorch's .bin files: converted as their safetensors twins are, and hostile ones refused."""

import errno
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from brim.checkpoints.archive import entries
from brim.checkpoints.convert import quantize
from brim.checkpoints.pickled import pickled_tensors
from brim.cli import main
from brim.errors import ModelFileError, UsageError

Maker = Callable[..., Path]
Captured = pytest.CaptureFixture[str]


def pickled(source: Path, *, tied: bool = False, shards: int = 1) -> Path:
    """The directory with .bin files instead, as transformers wrote them."""
    state: dict[str, Any] = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if shards == 1:
        torch.save(state, source / "pytorch_model.bin")
        return source
    names = sorted(state)
    weight_map = {name: f"pytorch_model-{names.index(name) % shards + 1:05d}-of-{shards:05d}.bin" for name in names}
    for shard in set(weight_map.values()):
        torch.save({name: state[name] for name in names if weight_map[name] == shard}, source / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return source


@pytest.mark.parametrize(("tied", "shards"), [(False, 1), (True, 1), (False, 3)])
@pytest.mark.parametrize("to", ["int8", "bf16"])
def test_bin_files_become_what_safetensors_do(to: Any, tied: bool, shards: int, tiny: Maker, tmp_path: Path) -> None:
    """A model in .bin files, one or several, with its tied head under two names or one, gives the output that it gives
    as safetensors, tensor by tensor."""
    source = tiny("llama", dtype=torch.float32)
    quantize(source, tmp_path / "expected", to=to)
    quantize(pickled(source, tied=tied, shards=shards), tmp_path / "output", to=to, unpickle=True)
    expected, output = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "output"))
    assert expected.keys() == output.keys()
    assert all(torch.equal(tensor, output[name]) for name, tensor in expected.items())
    assert (tmp_path / "expected" / "config.json").read_text() == (tmp_path / "output" / "config.json").read_text()


def test_views_have_their_place(tmp_path: Path) -> None:
    """A tensor that is a part of a storage, a scalar, integers and no elements at all are found at their bytes."""
    whole = torch.arange(40.0).view(10, 4)
    state = {"part": whole[3:5], "one": torch.tensor(7), "flags": torch.tensor([True, False]), "none": torch.ones(0, 4)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    for stored in pickled_tensors(tmp_path):
        tensor = state[stored.spec.name]
        expected = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert content[stored.offset : stored.offset + stored.spec.nbytes] == expected
        assert stored.spec.shape == tuple(tensor.shape)


def test_only_when_asked(tiny: Maker, tmp_path: Path, capsys: Captured) -> None:
    """Without --unpickle such a directory is refused with that word; with it the verb converts, also to FP32 as is."""
    source = pickled(tiny("llama"))
    capsys.readouterr()
    assert main(["quantize", str(source), "--to", "fp32", "--output", str(tmp_path / "output")]) == 4
    assert "--unpickle" in capsys.readouterr().err
    assert main(["quantize", str(source), "--to", "fp32", "--unpickle", "--output", str(tmp_path / "output")]) == 0
    assert load_file(tmp_path / "output" / "model.safetensors").keys()
    assert main(["quantize", "smollm2-135m", "--to", "int8", "--unpickle"]) == 2


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('ran')",))


def test_what_is_no_table_of_tensors_is_refused(tiny: Maker, tmp_path: Path) -> None:
    """Code, other objects, transposed views, the old form, compressed archives, cut files and shard names that leave
    the directory are refused; nothing of them runs, nothing is written."""
    source = pickled(tiny("llama"))
    path = source / "pytorch_model.bin"
    whole = path.read_bytes()

    def refused(match: str, kind: type[Exception] = ModelFileError) -> None:
        with pytest.raises(kind, match=match):
            quantize(source, tmp_path / "output", to="int8", unpickle=True)
        assert not (tmp_path / "output").exists()

    torch.save({"a": Hostile()}, path)
    refused("does not hold tensors alone")
    torch.save([torch.ones(2)], path)
    refused("the instruction EMPTY_LIST")
    torch.save(torch.ones(2), path)
    refused("no tensors by name")
    torch.save({"a": {"b": torch.ones(2)}}, path)
    refused("'a', which is no tensor")
    torch.save({"a": torch.ones(2, 3).t()}, path)
    refused("does not lie as its shape says")
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    refused("not a zip archive")
    path.write_bytes(pickle.dumps({"a": 1}))
    refused("not a zip archive")
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a zip archive")
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"x" * 100)
    refused("another kind")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/other.pkl", b"x" * 100)
    refused("another kind")
    torch.save({"a": torch.ones(2)}, path)
    lying = bytearray(path.read_bytes())
    for signature, offset, nbytes in ((b"PK\x06\x06", 40, 8), (b"PK\x05\x06", 12, 4)):
        at = lying.rfind(signature) + offset
        lying[at : at + nbytes] = (2**28).to_bytes(nbytes, "little")
    path.write_bytes(lying)
    refused("table of contents of 268,435,456 bytes")
    path.unlink()
    refused("has no pytorch_model.bin", UsageError)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    refused("not a plain name ending in .bin")


def test_a_disk_that_fails_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive that cannot be read is the system's error, and is not told as a damaged file."""
    path = tmp_path / "model.bin"
    torch.save({"a": torch.ones(2)}, path)

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile, "ZipFile", failing)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        entries(path, kind="a model")
