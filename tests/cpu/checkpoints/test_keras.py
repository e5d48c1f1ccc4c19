"""TensorFlow's weights: read as transformers 4 wrote them, and hostile files refused."""

import json
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from brim.checkpoints import hdf5
from brim.checkpoints.convert import quantize
from brim.checkpoints.keras_weights import keras_tensors
from brim.cli import main
from brim.errors import MissingPartError, ModelFileError

DATA = Path(__file__).parent / "data" / "keras"
KINDS: dict[str, Any] = {
    "bert": AutoModelForMaskedLM, "gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM,
    "bart": AutoModelForSeq2SeqLM, "bert-newer": AutoModelForMaskedLM, "gpt2-newer": AutoModelForCausalLM,
    "t5-newer": AutoModelForSeq2SeqLM,
}  # fmt: skip
"""Those of Keras's newer files have two layers: elements of a list are numbered there."""
Captured = pytest.CaptureFixture[str]


def twin(family: str, place: Path) -> Path:
    """The same model with the weights that went into TensorFlow, as safetensors."""
    place.mkdir()
    shutil.copyfile(DATA / family / "config.json", place / "config.json")
    save_file(load_file(DATA / family / "pytorch.safetensors"), place / "model.safetensors", {"format": "pt"})
    return place


def logits(family: str, directory: Path) -> torch.Tensor:
    model = KINDS[family].from_pretrained(directory).eval()
    tokens = torch.arange(3, 15).view(2, 6)
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tokens, **more).logits
    return result


@pytest.mark.parametrize("family", KINDS)
def test_what_tensorflow_saved_is_the_model_that_went_in(family: str, tmp_path: Path) -> None:
    """Each tensor has PyTorch's name, shape and bits, so the logits are equal."""
    quantize(DATA / family, tmp_path / "output", to="fp32")
    made, given = load_file(tmp_path / "output" / "model.safetensors"), load_file(DATA / family / "pytorch.safetensors")
    assert made.keys() == given.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in given.items())
    assert torch.equal(logits(family, tmp_path / "output"), logits(family, twin(family, tmp_path / "twin")))


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("bert", {"to": "int8"}),
        ("t5", {"to": "int8"}),
        ("gpt2", {"to": "int8", "layout": "bitsandbytes"}),
        ("bert", {"to": "int8", "layout": "bitsandbytes"}),
    ],
)
def test_what_is_made_of_them_is_what_is_made_of_safetensors(family: str, how: Any, tmp_path: Path) -> None:
    """Matrices that lie transposed in the file give the output that the upright ones give, byte by byte."""
    quantize(DATA / family, tmp_path / "output", **how)
    quantize(twin(family, tmp_path / "twin"), tmp_path / "expected", **how)
    made, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("output", "expected"))
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())


def test_the_verb_reads_them_and_others_say_how(tmp_path: Path, capsys: Captured) -> None:
    """`quantize` takes such a directory as it is; other verbs name the conversion."""
    assert main(["predict", str(DATA / "gpt2"), "--quick"]) == 4
    assert "brim quantize DIRECTORY --to fp32" in capsys.readouterr().err
    assert main(["quantize", str(DATA / "gpt2"), "--to", "bf16", "--output", str(tmp_path / "output")]) == 0
    assert load_file(tmp_path / "output" / "model.safetensors")["transformer.wte.weight"].dtype == torch.bfloat16


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "bert", tmp_path / "bert"))


def written(path: Path, write: Callable[[Any], object]) -> None:
    with h5py.File(path, "w") as file:
        write(file)


def far_away(file: Any) -> None:
    """A dataset whose bytes are another file's."""
    file.create_dataset("a/b/kernel:0", (4, 4), "f4", external=[("/etc/hostname", 0, 64)])


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
    file.create_virtual_dataset("a/b/kernel:0", layout)


Write = Callable[[Any], object]


def plain(name: str, *, value: float = 1, shape: tuple[int, ...] = (2, 2), dtype: str = "f4") -> Write:
    return lambda file: file.create_dataset(name, data=np.full(shape, value, dtype))


def cut(*, shape: tuple[int, ...] = (8, 8), **how: Any) -> Write:
    return lambda file: file.create_dataset("a/b/kernel:0", data=np.ones(shape, "f4"), **how)


def twice(file: Any) -> None:
    plain("a/b/kernel:0")(file)
    plain("c/b/kernel:0", value=2)(file)


HOSTILE: dict[str, tuple[str, Write]] = {
    "another file": ("data in other places", far_away),
    "virtual": ("data in other places", virtual),
    "text": ("holds no weights", lambda file: file.create_dataset("a/b/kernel:0", data=["x"])),
    "big-endian": ("holds >f4", plain("a/b/kernel:0", dtype=">f4")),
    "no bytes": ("has no bytes in the file", lambda file: file.create_dataset("a/b/kernel:0", (2**40, 2**20), "f4")),
    "a long name": ("a name of 2,000 characters", plain("a/b/" + "x" * 1996)),
    "unknown filter": ("by a filter that is not known", cut(compression="lzf")),
    "large pieces": ("pieces of more than 4,194,304 bytes", cut(shape=(2048, 1024), chunks=(2048, 1024))),
    "no pieces": ("lacks pieces: 0", lambda file: file.create_dataset("a/b/kernel:0", (8, 8), "f4", chunks=(2, 2))),
    "convolution": ("kernel of 3 dimensions", plain("a/b/kernel:0", shape=(2, 2, 2))),
    "no group": ("in no layer's group", plain("kernel:0")),
    "two of a name": ("two different variables", twice),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_transformers_does_not_write_is_refused(name: str, bert: Path) -> None:
    """Data of other files, other types, kernels that are no matrices: refused, with the file's and dataset's names."""
    match, write = HOSTILE[name]
    written(bert / "tf_model.h5", write)
    with pytest.raises(ModelFileError, match=rf"tf_model\.h5.*{match}"):
        quantize(bert, bert.parent / "output", to="fp32")
    assert not (bert.parent / "output").exists()


def test_damaged_files_are_refused(bert: Path) -> None:
    """A file that is no HDF5, or is cut, is refused by name."""
    path, whole = bert / "tf_model.h5", (DATA / "bert" / "tf_model.h5").read_bytes()
    path.write_bytes(b"not HDF5" * 100)
    with pytest.raises(ModelFileError, match="does not begin as HDF5"):
        keras_tensors(bert)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFileError, match=r"tf_model\.h5"):
        keras_tensors(bert)


def test_keras_archives_are_held_to_their_form(tmp_path: Path) -> None:
    """A .keras file without the weights inside, a family whose names are not known, paths that Keras does not make, and
    two files of weights are refused."""
    place = Path(shutil.copytree(DATA / "gpt2-newer", tmp_path / "gpt2"))
    config = (place / "config.json").read_text()
    (place / "config.json").write_text(config.replace('"gpt2"', '"electra"'))
    with pytest.raises(ModelFileError, match="known for bert, gpt2, t5, bart, and this is electra"):
        keras_tensors(place)
    (place / "config.json").write_text(config)
    with zipfile.ZipFile(place / "model.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ModelFileError, match=r"has no model\.weights\.h5 inside"):
        keras_tensors(place)
    written(place / "other.weights.h5", plain("transformer/h/vars/x"))
    with pytest.raises(ModelFileError, match=r"model\.keras|other\.weights\.h5 and model\.keras; leave one"):
        keras_tensors(place)
    (place / "model.keras").unlink()
    with pytest.raises(ModelFileError, match="not named as Keras names variables"):
        keras_tensors(place)
    written(place / "other.weights.h5", plain("transformer/ln_f/vars/2", shape=(2,)))
    with pytest.raises(ModelFileError, match="one variable more"):
        keras_tensors(place)


def test_a_crash_of_the_library_is_a_refusal(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The HDF5 library has a process of its own: where it dies by a signal, or takes all the memory it may, the file is
    refused."""
    for line in ("import os; os.kill(os.getpid(), 11)", "raise MemoryError"):
        (bert / "h5py.py").write_text(line)
        monkeypatch.setenv("PYTHONPATH", f"{bert}:{Path(hdf5.__file__).parents[2]}")
        with pytest.raises(ModelFileError, match=r"tf_model\.h5: the HDF5 library fails on it"):
            keras_tensors(bert)


@pytest.mark.parametrize("how", [{}, {"compression": "gzip", "shuffle": True}])
def test_what_is_held_in_pieces_is_the_same_model(how: Any, bert: Path, tmp_path: Path) -> None:
    """The same weights cut into pieces that divide no side, compressed or not, come out bit by bit."""
    with h5py.File(DATA / "bert" / "tf_model.h5") as source, h5py.File(bert / "tf_model.h5", "w") as target:

        def copy(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset):
                target.create_dataset(name, data=node[()], chunks=tuple(min(5, size) for size in node.shape), **how)

        source.visititems(copy)
    quantize(bert, tmp_path / "output", to="fp32")
    made, given = load_file(tmp_path / "output" / "model.safetensors"), load_file(DATA / "bert" / "pytorch.safetensors")
    assert made.keys() == given.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in given.items())


def test_a_damaged_piece_is_refused(bert: Path, tmp_path: Path) -> None:
    """A piece whose bytes were changed, or that unpacks to more than it may, is refused with the tensor's name."""
    path, ones = bert / "tf_model.h5", np.ones((1000, 1000), "f4")
    for content in (b"\0" * 40, zlib.compress(bytes(2**23))):
        with h5py.File(path, "w") as file:
            data = file.create_dataset("a/b/kernel:0", data=ones, chunks=(1000, 1000), compression="gzip")
            data.id.write_direct_chunk((0, 0), content)
        with pytest.raises(ModelFileError, match=r"tensor 'weight': piece 0 does not unpack to its bytes"):
            quantize(bert, tmp_path / "output", to="bf16")


def test_shards_are_held_against_the_index(tmp_path: Path) -> None:
    """A shard's name must be plain, and the shards must hold as many tensors as the index promises."""
    bart = Path(shutil.copytree(DATA / "bart", tmp_path / "bart"))
    index = bart / "tf_model.h5.index.json"
    facts = json.loads(index.read_text())
    index.write_text(json.dumps(facts | {"weight_map": dict(list(facts["weight_map"].items())[:-1])}))
    with pytest.raises(ModelFileError, match="promises 49 tensors"):
        keras_tensors(bart)
    index.write_text(json.dumps({"weight_map": {"a": "../tf_model.h5"}}))
    with pytest.raises(ModelFileError, match=r"not a plain name ending in \.h5"):
        keras_tensors(bart)


def test_without_h5py_the_command_that_installs_it_is_named(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """h5py is an extra."""
    (bert / "h5py.py").write_text("raise ModuleNotFoundError(\"No module named 'h5py'\")")
    monkeypatch.setenv("PYTHONPATH", f"{bert}:{Path(hdf5.__file__).parents[2]}")
    with pytest.raises(MissingPartError, match=r"pip install 'brim\[keras\]'"):
        keras_tensors(bert)
