"""What PyTorch calls a TensorFlow variable, and which way its matrix lies.

The rules are those of transformers 4 (modeling_tf_pytorch_utils.py; transformers 5 has no TensorFlow): the model's own
name goes, `a___b` is `b`, `_._` and `/` are levels; `kernel` is a transposed `weight`, `gamma` and `beta` are a norm's
`weight` and `bias`, `embeddings` is `weight`.
"""

from typing import NamedTuple

from brim.errors import ModelFileError

_WEIGHTS = ("kernel", "embeddings", "gamma")


class Named(NamedTuple):
    """A variable as PyTorch has it."""

    name: str
    shape: tuple[int, ...]
    transposed: bool
    """The variable lies as the transpose of `shape`."""


def named(variable: str, shape: tuple[int, ...], *, where: object) -> Named:
    """Of a TensorFlow variable, without its model's name. Raises ModelFileError for a kernel that is no matrix."""
    levels = [level.rpartition("___")[2] for level in variable.removesuffix(":0").replace("_._", "/").split("/")]
    *above, last = [level for level in levels if level] or [""]
    transposed = last == "kernel" and len(shape) > 1
    if transposed and len(shape) != 2:
        raise ModelFileError(
            f"{where}: {variable!r} is a kernel of {len(shape)} dimensions; Brim reads language models of linear "
            "layers and embeddings; convert this one with transformers 4"
        )
    if last == "bias" and len(shape) == 2 and shape[0] == 1:  # GPT-2's linear layers in TensorFlow: a row
        shape = shape[1:]
    name = ".".join([*above, "weight" if last in _WEIGHTS else "bias" if last == "beta" else last])
    return Named(name, shape[::-1] if transposed else shape, transposed)
