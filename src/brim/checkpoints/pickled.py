"""Weights in PyTorch's own files (`pytorch_model.bin`), read only when asked: which tensors they hold, and where.

Such a file is a zip archive of a pickle and of storages, uncompressed. torch's restricted unpickler (weights_only)
reads the pickle on fake tensors, so no weight is read and nothing but tensors can be made; each tensor's place in the
file then serves like one of a safetensors file, once it is known to lie inside.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from brim.errors import ModelFileError, UsageError
from brim.models.directory import StoredTensor, check_index, checked_file, parse_weight_map, shard_names
from brim.models.files import MAX_JSON_BYTES, file_size, read_json_object
from brim.models.spec import TensorSpec
from brim.numerics.encode import TORCH_DTYPES

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {
    getattr(torch, name): name for name in ("bool", "uint8", "int8", "int16", "int32", "int64")
}


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
    size = file_size(path)
    _check_archive(path)
    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, ValueError, EOFError, AttributeError, KeyError, TypeError) as error:
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelFileError(f"{path} does not hold tensors alone, or is damaged: {first}") from None
    if not isinstance(state, dict):
        raise ModelFileError(f"{path} holds no tensors by name; save the model with model.save_pretrained(directory)")
    return [_stored(path, size, name, tensor) for name, tensor in state.items()]


def _check_archive(path: Path) -> None:
    """Raises ModelFileError for the older form of such files, and for a pickle that is too large to be of tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
            compressed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise ModelFileError(
            f"{path} is not a zip archive as torch.save has written since PyTorch 1.6; load and save the model anew"
        ) from None
    if compressed or len(pickles) != 1 or pickles[0].file_size > MAX_JSON_BYTES:
        raise ModelFileError(f"{path} is an archive of another kind than torch.save writes")


def _stored(path: Path, size: int, name: Any, tensor: Any) -> StoredTensor:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise ModelFileError(f"{path} holds {name!r}, which is no tensor; save the model's weights alone")
    if not tensor.is_contiguous() or tensor.layout != torch.strided or tensor.dtype not in _NAMES:
        raise ModelFileError(
            f"{path}: tensor {name!r} ({tensor.dtype}, strides {tensor.stride()}) does not lie as its shape says; "
            "load and save the model anew"
        )
    nbytes = tensor.numel() * tensor.itemsize
    storage: Any = tensor.untyped_storage()
    begin = int(storage._checkpoint_offset) + int(tensor.storage_offset()) * tensor.itemsize if nbytes else 0
    if begin < 0 or begin + nbytes > size:
        raise ModelFileError(f"{path}: tensor {name!r} ends at {begin + nbytes:,}, past the file's end ({size:,})")
    spec = TensorSpec(name=name, shape=tuple(tensor.shape), dtype=_NAMES[tensor.dtype], nbytes=nbytes)
    return StoredTensor(spec=spec, path=path, offset=begin)
