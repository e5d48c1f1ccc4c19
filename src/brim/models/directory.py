"""Reads a Hugging Face model directory: which files hold the weights, and which tensors they declare.

The index of a sharded model is untrusted: a shard's name must be a plain name inside the directory, and a link must
lead to the directory itself or to the blobs of the Hub cache that it belongs to. transformers joins names unchecked.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from brim.errors import ModelFileError
from brim.models.files import read_json_object, unreadable
from brim.models.pieces import Pieces
from brim.models.safetensors_header import read_header
from brim.models.spec import TensorSpec

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_KERAS = ("tf_model.h5.index.json", "tf_model.h5")
_CHECKPOINTS = ("*.ckpt.index", "*.data-00000-of-*")
_KERAS_OF_ANY_NAME = ("*.weights.h5", "*.keras")
_SAMPLES, _SAMPLE_BYTES = 32, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor and where its bytes are."""

    spec: TensorSpec
    path: Path
    offset: int
    """Of its first byte in the file."""
    transposed: bool = False
    """The file holds the transpose of the matrix that `spec` tells of, as TensorFlow's do."""
    pieces: Pieces | None = None
    """Where its bytes are, if not one after another from `offset` on."""


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of this model, in order of name; empty when it has no weights. Raises ModelFileError."""
    if (directory / INDEX).exists():
        return tuple(checked_file(directory, name) for name in shard_names(_weight_map(directory / INDEX), INDEX))
    if _is_there(directory / SINGLE):
        return (checked_file(directory, SINGLE),)
    if name := keras_file(directory):
        raise ModelFileError(
            f"{directory} holds its weights as TensorFlow's or Keras's {name}; convert it once with "
            "brim quantize DIRECTORY --to fp32, and use what that makes"
        )
    if any((directory / name).exists() for name in _PICKLES):
        raise ModelFileError(
            f"{directory} holds its weights as pickle (.bin), which can run code when read; "
            "convert it once with brim quantize DIRECTORY --unpickle, or save the model as safetensors"
        )
    if checkpoint := next((path for pattern in _CHECKPOINTS for path in directory.glob(pattern)), None):
        raise ModelFileError(
            f"{directory} holds its weights as a TensorFlow checkpoint ({checkpoint.name}), which is not read: load it "
            "once with transformers 4 (from_tf=True) and save_pretrained, which writes safetensors"
        )
    return ()


def keras_file(directory: Path) -> str | None:
    """The file of TensorFlow's weights that is read, or their index, where the directory has no safetensors.

    Raises ModelFileError where several could be meant.
    """
    if any(_is_there(directory / name) for name in (SINGLE, INDEX)):
        return None
    for name in _KERAS:
        if _is_there(directory / name):
            return name
    found = sorted(path.name for pattern in _KERAS_OF_ANY_NAME for path in directory.glob(pattern))
    if len(found) > 1:
        raise ModelFileError(f"{directory} holds {' and '.join(found[:4])}; leave one of them there")
    return found[0] if found else None


def _is_there(path: Path) -> bool:
    """Also a link that leads nowhere, which is then refused by name."""
    return path.is_symlink() or path.exists()


def read_tensors(directory: Path) -> tuple[TensorSpec, ...]:
    """The tensors that the model's files declare, in order of file and place. Raises ModelFileError."""
    return tuple(tensor.spec for tensor in stored_tensors(directory))


def stored_tensors(directory: Path) -> tuple[StoredTensor, ...]:
    """As `read_tensors`, each with its place. Raises ModelFileError."""
    found = [tensor for path in weight_files(directory) for tensor in _tensors_in(path)]
    if (index := directory / INDEX).exists():
        check_index(_weight_map(index), [(tensor.spec.name, tensor.path.name) for tensor in found], where=index)
    return tuple(found)


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are copies of each other, by 32 samples spread over them; reads 256 KiB at most.

    Those in pieces are taken for different ones.
    """
    if (one.spec.shape, one.spec.dtype) != (other.spec.shape, other.spec.dtype) or one.pieces or other.pieces:
        return False
    step = max(1, one.spec.nbytes // _SAMPLES)
    try:
        with one.path.open("rb") as one_file, other.path.open("rb") as other_file:
            for begin in range(0, one.spec.nbytes, step):
                count = min(_SAMPLE_BYTES, one.spec.nbytes - begin)
                one_file.seek(one.offset + begin)
                other_file.seek(other.offset + begin)
                if one_file.read(count) != other_file.read(count):
                    return False
    except OSError as error:
        raise unreadable(one.path, error) from None
    return True


def _tensors_in(path: Path) -> list[StoredTensor]:
    header = read_header(path)
    return [StoredTensor(spec=t.spec, path=path, offset=header.data_start + t.begin) for t in header.tensors]


def shard_names(weight_map: dict[str, str], where: object, *, suffix: str = ".safetensors") -> tuple[str, ...]:
    """The distinct file names in a shard index, in order, each checked. Raises ModelFileError."""
    names = sorted(set(weight_map.values()))
    for name in names:
        # Both separators on every system: a model saved on one is read on another.
        if not name.endswith(suffix) or set(name) & set("/\\\0:") or name.startswith("."):
            raise ModelFileError(f"{where}: shard name {name!r} is not a plain name ending in {suffix}; "
                                 "the index is damaged or hostile")  # fmt: skip
    return tuple(names)


def parse_weight_map(index: dict[str, object], where: object) -> dict[str, str]:
    """Tensor name -> shard name, from a shard index. Raises ModelFileError."""
    declared = index.get("weight_map")
    if not isinstance(declared, dict) or not declared:
        raise ModelFileError(f"{where} has no weight_map, which says which shard holds which tensor")
    for name, shard in declared.items():
        if not isinstance(shard, str):
            raise ModelFileError(f"{where}: the shard of tensor {name!r} is not a name")
    return declared


def check_index(weight_map: dict[str, str], found: Iterable[tuple[str, str]], *, where: object) -> None:
    """The index and the (tensor, shard) pairs found in the shards say the same. Raises ModelFileError."""
    shard_of: dict[str, str] = {}
    for name, shard in found:
        if name in shard_of:
            raise ModelFileError(f"{where}: tensor {name!r} is in two shards, {shard_of[name]} and {shard}")
        if weight_map.get(name, shard) != shard:
            raise ModelFileError(f"{where}: tensor {name!r} is said to be in {weight_map[name]}, but it is in {shard}")
        shard_of[name] = shard
    for name, shard in weight_map.items():
        if name not in shard_of:
            raise ModelFileError(f"{where}: shard {shard} lacks tensor {name!r}, which the index promises")


def checked_file(directory: Path, name: str) -> Path:
    """The file of this name in a model directory, once its links are known to stay inside. Raises ModelFileError."""
    path = directory / name
    try:
        real, root = path.resolve(strict=True), directory.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        raise ModelFileError(f"{path} does not exist, or its link leads nowhere") from None
    # The Hub cache: models--x/snapshots/<commit>/<name> links to models--x/blobs/<hash>.
    blobs = root.parent.parent / "blobs"
    allowed = (root, blobs) if root.parent.name == "snapshots" else (root,)
    if not any(real.is_relative_to(place) for place in allowed):
        raise ModelFileError(f"{path} is a link to {real}, outside its directory; copy the file in if you trust it")
    return path


def _weight_map(index: Path) -> dict[str, str]:
    return parse_weight_map(read_json_object(checked_file(index.parent, index.name)), index)
