"""TensorFlow's and Keras's weights as transformers 4 wrote them: `tf_model.h5`, in shards too, `.weights.h5`, `.keras`.

Their tensors get the names and shapes that PyTorch has for them; matrices that lie transposed are read as they lie.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from brim.checkpoints.archive import entries
from brim.checkpoints.hdf5 import Dataset, datasets
from brim.checkpoints.keras_names import named
from brim.checkpoints.keras_paths import variable_of
from brim.checkpoints.reader import tiles
from brim.errors import ModelFileError
from brim.models.directory import StoredTensor, checked_file, keras_file, parse_weight_map, same_bytes, shard_names
from brim.models.files import read_json_object
from brim.models.spec import TensorSpec

_INNER = "model.weights.h5"
"""In a .keras archive."""


def keras_tensors(directory: Path) -> tuple[StoredTensor, ...]:
    """The tensors of the model's HDF5 files, by PyTorch's names, in order of file and path; of copies the first.

    Raises ModelFileError for files that are damaged, or not as transformers wrote them.
    """
    name = keras_file(directory)
    assert name is not None, directory
    if name.endswith(".json"):
        return _distinct(_in_shards(directory, name), directory / name)
    path = checked_file(directory, name)
    found = datasets(path, *_inside(path)) if name.endswith(".keras") else datasets(path)
    if any("/vars/" in dataset.name for dataset in found):
        family = str(read_json_object(checked_file(directory, "config.json")).get("model_type"))
        variables = [variable_of(dataset.name, dataset.shape, family=family, where=path) for dataset in found]
    else:
        variables = [_variable(dataset.name, path) for dataset in found]
    return _distinct((_stored(path, *pair) for pair in zip(found, variables, strict=True)), path)


def _inside(path: Path) -> tuple[int, int]:
    """Where the HDF5 data of a .keras archive begin and end."""
    found = entries(path, kind="Keras 3 writes one; save the model anew with model.save")
    if _INNER not in found:
        raise ModelFileError(f"{path} has no {_INNER} inside, so it is none of Keras's archives of a model")
    return found[_INNER]


def _in_shards(directory: Path, index: str) -> Iterator[StoredTensor]:
    weight_map = parse_weight_map(read_json_object(checked_file(directory, index)), directory / index)
    found = 0
    for shard in shard_names(weight_map, index, suffix=".h5"):
        path = checked_file(directory, shard)
        for dataset in datasets(path):
            found += 1
            # A shard leaves the model's own name away, but not for names such as BART's model.shared.
            without = dataset.name.partition("/")[2] if "model." in dataset.name else dataset.name
            yield _stored(path, dataset, without)
    if found != len(weight_map):
        raise ModelFileError(
            f"{directory / index} promises {len(weight_map)} tensors, and its shards hold {found}; copy the files anew"
        )


def _variable(name: str, path: Path) -> str:
    """Of LAYER/MODEL/VARIABLE: the layers of the model have a group each, then comes the whole name."""
    _, _, whole = name.partition("/")
    if not whole:
        raise ModelFileError(f"{path}: dataset {name!r} is in no layer's group, and transformers 4 wrote all in some")
    return whole.partition("/")[2] or whole


def _distinct(tensors: Iterable[StoredTensor], where: Path) -> tuple[StoredTensor, ...]:
    """Keras writes a layer that two others share twice."""
    by_name: dict[str, StoredTensor] = {}
    for tensor in tensors:
        other = by_name.setdefault(tensor.spec.name, tensor)
        if other is not tensor and not _are_copies(other, tensor):
            raise ModelFileError(f"{tensor.path}: two different variables are tensor {other.spec.name!r}")
    if not by_name:
        raise ModelFileError(f"{where} holds no weights; copy the model anew")
    return tuple(by_name.values())


def _are_copies(one: StoredTensor, other: StoredTensor) -> bool:
    if one.pieces is None and other.pieces is None:
        return same_bytes(one, other)
    if (one.spec.shape, one.spec.dtype) != (other.spec.shape, other.spec.dtype):
        return False
    return all(torch.equal(first, second) for first, second in zip(tiles(one), tiles(other), strict=True))


def _stored(path: Path, dataset: Dataset, variable: str) -> StoredTensor:
    what = named(variable, dataset.shape, where=path)
    spec = TensorSpec(name=what.name, shape=what.shape, dtype=dataset.dtype, nbytes=dataset.nbytes)
    return StoredTensor(spec=spec, path=path, offset=dataset.offset, transposed=what.transposed, pieces=dataset.pieces)
