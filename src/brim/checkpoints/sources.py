"""Where a directory's weights are: in safetensors, in TensorFlow's files or, when asked for, in PyTorch's pickles."""

from pathlib import Path

from brim.checkpoints.keras_weights import keras_tensors
from brim.checkpoints.pickled import pickled_tensors
from brim.models.describe import describe_directory
from brim.models.directory import StoredTensor, keras_file, stored_tensors
from brim.models.spec import ModelSpec


def read_model(source: Path, unpickle: bool) -> tuple[ModelSpec, tuple[StoredTensor, ...]]:
    """What the model is, and where its tensors are."""
    if unpickle:
        stored = pickled_tensors(source)
    else:
        stored = keras_tensors(source) if keras_file(source) else stored_tensors(source)
    return describe_directory(str(source.resolve()), source.resolve(), stored), stored
