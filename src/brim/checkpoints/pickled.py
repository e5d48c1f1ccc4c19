"""Weights in PyTorch's own files (`pytorch_model.bin`), read only when asked: which tensors they hold, and where.

Such a file is a zip archive of a pickle and of storages, uncompressed. The pickle is not run (`pickle_table`), and no
weight is read; each tensor's place in the file then serves like one of a safetensors file, once it is known to lie
inside its storage.
"""

from math import prod
from pathlib import Path

from brim.checkpoints.archive import entries
from brim.checkpoints.pickle_table import PickledTensor, table_of
from brim.errors import ModelFileError, UsageError
from brim.models.directory import StoredTensor, check_index, checked_file, parse_weight_map, shard_names
from brim.models.files import MAX_JSON_BYTES, read_json_object
from brim.models.spec import TensorSpec

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
_DATA = "data/"
_KIND = "torch.save writes one since PyTorch 1.6; load and save the model anew"
_ITEM_BYTES = {
    "fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2, "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
}  # fmt: skip


def pickled_tensors(directory: Path) -> tuple[StoredTensor, ...]:
    """The tensors of the model's .bin files, in order of file; of several that share their bytes the first.

    Raises UsageError where there is no such file, ModelFileError for one that is not as PyTorch writes them.
    """
    found = [tensor for path in _files(directory) for tensor in _tensors_in(path)]
    if (index := directory / INDEX).exists():
        weight_map = parse_weight_map(read_json_object(checked_file(directory, INDEX)), index)
        check_index(weight_map, [(tensor.spec.name, tensor.path.name) for tensor in found], where=index)
    # A tied head is saved under both names, and its bytes once.
    first = {(tensor.path, tensor.offset, tensor.spec.shape): tensor for tensor in reversed(found)}
    return tuple(tensor for tensor in found if first[tensor.path, tensor.offset, tensor.spec.shape] is tensor)


def _files(directory: Path) -> tuple[Path, ...]:
    if (directory / INDEX).exists():
        weight_map = parse_weight_map(read_json_object(checked_file(directory, INDEX)), directory / INDEX)
        return tuple(checked_file(directory, name) for name in shard_names(weight_map, INDEX, suffix=".bin"))
    if (directory / SINGLE).is_symlink() or (directory / SINGLE).exists():
        return (checked_file(directory, SINGLE),)
    raise UsageError(f"{directory} has no {SINGLE} and no {INDEX}; leave --unpickle away")


def _tensors_in(path: Path) -> list[StoredTensor]:
    found = {name.partition("/")[2]: place for name, place in entries(path, kind=_KIND).items()}
    if "data.pkl" not in found or _nbytes(found["data.pkl"]) > MAX_JSON_BYTES:
        raise ModelFileError(f"{path} is an archive of another kind than torch.save writes")
    if "byteorder" in found and _read(path, found["byteorder"], most_bytes=8) == b"big":
        raise ModelFileError(f"{path} was written on a machine of the other byte order; {_KIND}")
    table = table_of(_read(path, found["data.pkl"], most_bytes=MAX_JSON_BYTES), where=path)
    places = {name.removeprefix(_DATA): place for name, place in found.items() if name.startswith(_DATA)}
    return [_stored(path, places, name, tensor) for name, tensor in table.items()]


def _nbytes(place: tuple[int, int]) -> int:
    return place[1] - place[0]


def _read(path: Path, place: tuple[int, int], *, most_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(min(_nbytes(place), most_bytes))


def _stored(path: Path, places: dict[str, tuple[int, int]], name: str, tensor: PickledTensor) -> StoredTensor:
    if not _lies_in_order(tensor):
        raise ModelFileError(
            f"{path}: tensor {name!r} ({tensor.dtype}, strides {tensor.strides}) does not lie as its shape says; "
            "load and save the model anew"
        )
    itemsize, numel = _ITEM_BYTES[tensor.dtype], prod(tensor.shape)
    spec = TensorSpec(name=name, shape=tensor.shape, dtype=tensor.dtype, nbytes=numel * itemsize)
    if not numel:
        return StoredTensor(spec=spec, path=path, offset=0)
    if tensor.storage not in places:
        raise ModelFileError(f"{path}: the archive lacks the bytes of tensor {name!r}; download it again")
    begin, end = places[tensor.storage]
    begin += tensor.begin * itemsize
    if begin + spec.nbytes > end:
        raise ModelFileError(
            f"{path}: tensor {name!r} ends at {begin + spec.nbytes:,}, past its storage's end ({end:,})"
        )
    return StoredTensor(spec=spec, path=path, offset=begin)


def _lies_in_order(tensor: PickledTensor) -> bool:
    """One row after another, without holes. Strides of axes of one element say nothing."""
    if len(tensor.shape) != len(tensor.strides):
        return False
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected:
            return not prod(tensor.shape)
        expected *= size
    return True
