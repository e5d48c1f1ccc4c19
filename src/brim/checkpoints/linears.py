"""Which tensors of a model are weights of linear layers: asked of the model's modules, not of its tensors' names."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from brim.models.skeleton import skeleton
from brim.models.spec import ModelSpec


class Linears(NamedTuple):
    """The linear modules of a model."""

    weights: frozenset[str]
    """Names in the file of the weights to quantize."""
    left_alone: tuple[str, ...]
    """Names in the model of the linear modules that keep their format: the head, and those without a tensor here."""


def find_linears(spec: ModelSpec, *, tensors: Iterable[str]) -> Linears:
    """The linear modules of this model, by building it without memory for its weights.

    `tensors` names those in the file that can be quantized. The output head is left alone, and every module that shares
    its weight with another: quantizing one of them would untie the two.
    Raises UsageError for a family that transformers does not know.
    """
    with torch.device("meta"):
        model = skeleton(spec, dtype="fp32", attention="eager")
    modules = dict(model.named_modules())
    holders = Counter(id(parameter) for module in modules.values() for parameter in module.parameters(recurse=False))
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings()
    file_names = _file_names(linears, frozenset(tensors), prefix=f"{model.base_model_prefix}.")
    wanted = {
        name: file_names[name]
        for name, module in linears.items()
        if name in file_names and module is not head and holders[id(module.weight)] == 1
    }
    return Linears(frozenset(wanted.values()), tuple(sorted(linears.keys() - wanted.keys())))


def _file_names(modules: Iterable[str], tensors: frozenset[str], *, prefix: str) -> dict[str, str]:
    """Module -> name of its weight in the file, for those that are there.

    A file saved from the bare model, without head, lacks the prefix that its modules have here, or has one too many;
    transformers finds such tensors, so this does as well.
    """
    found = {}
    for module in modules:
        own = f"{module}.weight"
        candidates = (name for name in (own, own.removeprefix(prefix), prefix + own) if name in tensors)
        if name := next(candidates, None):
            found[module] = name
    return found
