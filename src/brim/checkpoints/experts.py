"""Experts of a mixture: matrices that a model holds merged in one tensor and a checkpoint most often one by one.

Readers of packed weights know them one by one, by the names that transformers merges when it loads. So a tensor that
holds them merged is looked at as that many matrices, each a run of the file's bytes.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from brim.checkpoints.linears import FLOATS, Linears, file_names, find_linears, float_matrices
from brim.errors import UsageError
from brim.models.directory import StoredTensor
from brim.models.quiet import quiet_transformers
from brim.models.skeleton import skeleton
from brim.models.spec import ModelSpec, TensorSpec


class _Merge(NamedTuple):
    """What transformers makes of matrices, one of each source for each expert: a tensor (experts, rows of all, K)."""

    sources: tuple[str, ...]
    """Ends of their names, `*` for the number."""
    target: str
    """End of the tensor's name."""


def find_weights(
    spec: ModelSpec, stored: Sequence[StoredTensor], *, row_multiple: int = 1
) -> tuple[tuple[StoredTensor, ...], Linears, frozenset[str]]:
    """The tensors with experts one by one; the linear modules, experts among them; and the names of the experts'.

    Experts whose rows are no multiple of `row_multiple` raise UsageError: readers take all of a layer's or none.
    """
    with torch.device("meta"), quiet_transformers():
        model = skeleton(spec, dtype="fp32", attention="eager")
    merges = tuple(_merges(model))
    apart = tuple(part for tensor in stored for part in _apart(tensor, merges))
    names = float_matrices(apart)
    experts = frozenset(name for name in names if any(_is_source(name, merge) for merge in merges))
    linears = find_linears(spec, tensors=names, row_multiple=row_multiple, merges_experts=not experts)
    if not experts:
        return apart, linears, experts
    odd = [part for part in apart if part.spec.name in experts and part.spec.shape[1] % row_multiple]
    if odd:
        raise UsageError(
            f"tensor {odd[0].spec.name!r}: experts' rows of {odd[0].spec.shape[1]} elements are no whole blocks of "
            f"{row_multiple}; use --to int8 or fp8"
        )
    routers = _routers(model, set(names) - experts)
    whole = Linears(
        linears.weights | experts,
        tuple(sorted({*linears.left_alone, *routers})),
        linears.transposed,
        {**linears.modules, **{name: name.removesuffix(".weight") for name in experts}},
    )
    return apart, whole, experts


def _merges(model: PreTrainedModel) -> Iterator[_Merge]:
    for transform in get_model_conversion_mapping(model):
        if not isinstance(transform, WeightConverter):
            continue
        sources, targets = transform._original_source_patterns, transform._original_target_patterns
        merge, *rest = transform.operations
        plain = isinstance(merge, MergeModulelist) and merge.dim == 0
        joined = all(isinstance(operation, Concatenate) and operation.dim == 1 for operation in rest)
        if (
            plain
            and joined
            and len(targets) == 1
            and all(re.fullmatch(r"[\w.]*\.\*\.[\w.]+\.weight", s) for s in sources)
        ):
            yield _Merge(tuple(sources), targets[0])


def _is_source(name: str, merge: _Merge) -> bool:
    return any(re.search(re.escape(source).replace(r"\*", r"\d+") + "$", name) for source in merge.sources)


def _apart(tensor: StoredTensor, merges: Iterable[_Merge]) -> Iterator[StoredTensor]:
    """The matrices of a merged tensor, in the order of their bytes; any other tensor as it is."""
    spec = tensor.spec
    merge = next((each for each in merges if spec.name.endswith(each.target)), None)
    if merge is None or len(spec.shape) != 3 or spec.dtype not in FLOATS or spec.shape[1] % len(merge.sources):
        yield tensor
        return
    experts, rows, inputs = spec.shape
    shape = (rows // len(merge.sources), inputs)
    nbytes = spec.nbytes // (experts * len(merge.sources))
    begin = spec.name.removesuffix(merge.target)
    for number in range(experts):
        for place, source in enumerate(merge.sources):
            part = TensorSpec(
                name=begin + source.replace("*", str(number)), shape=shape, dtype=spec.dtype, nbytes=nbytes
            )
            yield replace(tensor, spec=part, offset=tensor.offset + (number * len(merge.sources) + place) * nbytes)


def _routers(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Modules, as the file calls them, of matrices that are neither linear nor embeddings: readers that make linear
    modules of them must know that they are left alone."""
    known = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    found = set(file_names(known, frozenset(names), model).values())
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight") and name not in found]
