"""Which tensors of a model are weights of linear layers: asked of the model's modules, not of its tensors' names."""

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from brim.errors import UsageError
from brim.models.directory import StoredTensor
from brim.models.quiet import quiet_transformers
from brim.models.skeleton import skeleton
from brim.models.spec import ModelSpec

FLOATS = ("fp64", "fp32", "fp16", "bf16")
"""What is quantized; anything else is as it was meant to be."""


class Linears(NamedTuple):
    """The linear modules of a model."""

    weights: frozenset[str]
    """Names in the file of the weights to quantize."""
    left_alone: tuple[str, ...]
    """Names in the model of the linear modules that keep their format: the head, and those without a tensor here."""
    transposed: frozenset[str] = frozenset()
    """Names in the file of the weights of Conv1D modules (GPT-2), linear ones whose weights lie transposed."""
    modules: Mapping[str, str] = MappingProxyType({})
    """Name in the file of a weight to quantize -> name in the model of its module."""


def find_linears(
    spec: ModelSpec,
    *,
    tensors: Iterable[str],
    row_multiple: int = 1,
    of_bitsandbytes: bool = False,
    merges_experts: bool = True,
) -> Linears:
    """The linear modules of this model, by building it without memory for its weights.

    `tensors` names those in the file that can be quantized, if their inputs are a multiple of `row_multiple`.
    `merges_experts`: the layout's readers do, of plain weights, which fails beside quantized ones.
    `of_bitsandbytes`: what its readers see as linear: Conv1D too, and not what transformers keeps in FP32 (T5's `wo`).
    The output head is left alone, and every module that shares its weight with another: quantizing one of them would
    untie the two.
    Raises UsageError for a family that transformers does not know, or that it cannot load with quantized weights.
    """
    with torch.device("meta"), quiet_transformers():
        model = skeleton(spec, dtype="fp32", attention="eager")
    if merges_experts:
        _check_unmerged(model, spec)
    modules = dict(model.named_modules())
    holders = Counter(id(parameter) for module in modules.values() for parameter in module.parameters(recurse=False))
    kinds = (nn.Linear, Conv1D) if of_bitsandbytes else nn.Linear
    linears = {name: module for name, module in modules.items() if isinstance(module, kinds)}
    wide = tuple(model._keep_in_fp32_modules or ()) if of_bitsandbytes else ()
    head = model.get_output_embeddings()
    weights = file_names([f"{name}.weight" for name in linears], frozenset(tensors), model)
    wanted = {
        name: weights[f"{name}.weight"]
        for name, module in linears.items()
        if f"{name}.weight" in weights
        and module is not head
        and holders[id(module.weight)] == 1
        and _inputs(module) % row_multiple == 0
        and not name.endswith(wide)
    }
    transposed = frozenset(weight for name, weight in wanted.items() if isinstance(linears[name], Conv1D))
    left_alone = tuple(sorted(linears.keys() - wanted.keys()))
    modules_of = {weight: name for name, weight in wanted.items()}
    return Linears(frozenset(wanted.values()) - transposed, left_alone, transposed, modules_of)


def float_matrices(stored: Iterable[StoredTensor]) -> list[str]:
    """Names of the tensors that could be weights of linear modules."""
    specs = (tensor.spec for tensor in stored)
    return [spec.name for spec in specs if spec.dtype in FLOATS and len(spec.shape) == 2 and spec.numel > 0]


def _inputs(module: nn.Linear | Conv1D) -> int:
    return module.in_features if isinstance(module, nn.Linear) else int(module.weight.shape[0])


def _check_unmerged(model: PreTrainedModel, spec: ModelSpec) -> None:
    """Raises UsageError for experts that the file holds one by one and the model as a single tensor.

    transformers merges them when it loads, and torchao's and bitsandbytes' layouts have no form for that.
    """
    stacked = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    there = file_names(stacked, frozenset(tensor.name for tensor in spec.tensors), model)
    if merged := [name for name in stacked if name not in there]:
        raise UsageError(
            f"{spec.name}: transformers makes {merged[0]} of several tensors when it loads {spec.model_type}, "
            "and cannot do so beside this layout's weights; use --layout compressed-tensors, or --to bf16 or fp16"
        )


def file_names(names: Iterable[str], tensors: frozenset[str], model: PreTrainedModel) -> dict[str, str]:
    """Parameter of the model -> name of its tensor in the file, for those that are there.

    A file saved from the bare model, without head, lacks the prefix that its modules have here, or has one too many;
    transformers finds such tensors, so this does as well.
    """
    prefix = f"{model.base_model_prefix}."
    found = {}
    for own in names:
        candidates = (name for name in (own, own.removeprefix(prefix), prefix + own) if name in tensors)
        if name := next(candidates, None):
            found[own] = name
    return found
