"""What an operator on a CPU takes from the allocator and gives back before it returns: no output shows it.

Two causes, and two ways to know how much:

- **Casts.** An elementwise operator (TensorIterator) on two formats casts each operand that is not in the common one
  into memory of its own, and a target in another format, too; a sum or mean that works in a wider format than its input
  casts the input. That is a rule, of any size (aten/src/ATen/TensorIterator.cpp, `compute_types`).
- **Kernels of libraries.** oneDNN packs operands of 16-bit matmuls into blocks whose size depends on the processor, and
  attention keeps scores of some rows for each thread. No call says how much, so the operator is asked: it runs once for
  real on zeros of the same shapes, under the profiler, and the answer is kept. Only up to so many multiplications:
  blocks do not grow without end, and larger operators belong to models of which they are a small share.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from brim.memory.measured import highest_bytes

_MOST_PRODUCTS = 2**31
"""Multiplications of an operator that is run to be asked: some hundredths of a second on one core."""
_ATEN = torch.ops.aten
_MATMULS = frozenset({_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN._grouped_mm})
_ATTENTION = frozenset(
    {_ATEN._scaled_dot_product_flash_attention_for_cpu, _ATEN._scaled_dot_product_flash_attention_for_cpu_backward}
)
_REDUCTIONS = frozenset({_ATEN.sum, _ATEN.mean, _ATEN.prod, _ATEN.linalg_vector_norm})
_CONDITION_FIRST = frozenset({_ATEN.where})
_CASTS_NOTHING = frozenset({_ATEN.masked_fill, _ATEN.clone})
_ANSWERS: dict[tuple[object, ...], int] = {}
"""Operator, threads, shapes, strides and formats -> bytes; the same in every rehearsal of a process."""


def scratch_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes beyond its outputs that this operator holds at its worst moment."""
    packet = func.overloadpacket
    if packet in _MATMULS or packet in _ATTENTION:
        return _asked(func, args, kwargs)
    if not isinstance(out, Tensor):
        return 0
    if packet in _REDUCTIONS:
        return _reduction_bytes(packet, args[0], out)
    return _cast_bytes(func, packet, args, out) if _is_elementwise(func) else 0


@cache
def _is_elementwise(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags and func.overloadpacket not in _CASTS_NOTHING


def _cast_bytes(func: Any, packet: Any, args: tuple[Any, ...], out: Tensor) -> int:
    operands = [arg for arg in args[packet in _CONDITION_FIRST :] if isinstance(arg, Tensor)]
    formats = {operand.dtype for operand in operands}
    if len(formats) == 1 and (out.dtype in formats or out.dtype == torch.bool):
        return 0  # nearly always
    common = _common_format(operands)
    if out.dtype.is_floating_point and not common.is_floating_point:
        common = out.dtype  # a fraction, or a root, of integers
    cast = [operand for operand in operands if operand.dtype != common]
    if func._schema.is_mutable and out.dtype != common:
        cast.append(out)
    return sum(operand.numel() for operand in cast) * common.itemsize


def _common_format(operands: list[Tensor]) -> torch.dtype:
    common = operands[0].dtype if operands[0].dim() else torch.bool
    for operand in operands:
        if operand.dim():
            common = torch.promote_types(common, operand.dtype)
    for operand in operands:
        if not operand.dim() and _rank(operand.dtype) > _rank(common):
            common = operand.dtype
    return common


def _rank(dtype: torch.dtype) -> int:
    """A number without dimensions decides the format only where it is of a higher kind than all tensors."""
    return 2 if dtype.is_floating_point else int(dtype != torch.bool)


def _reduction_bytes(packet: Any, tensor: Tensor, out: Tensor) -> int:
    """The whole input in the format that is worked in, where that is not its own."""
    works_in = out.dtype
    if packet is _ATEN.mean and works_in.itemsize == 2:
        works_in = torch.float32
        return (tensor.numel() + out.numel()) * works_in.itemsize
    return tensor.numel() * works_in.itemsize if works_in != tensor.dtype else 0


def _asked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """What this operator takes on this processor; 0 where it is too large to be run, or a profiler is at work."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    packet = func.overloadpacket
    if packet not in _ATTENTION and tensors[0].dtype.itemsize != 2:
        return 0  # in FP32, matmuls are MKL's, whose memory is its own
    if _products(packet, tensors) > _MOST_PRODUCTS or torch.autograd._profiler_enabled():
        return 0
    key = (func, torch.get_num_threads(), *map(_looks, leaves))
    if key not in _ANSWERS:
        _ANSWERS[key] = _ask(func, args, kwargs)
    return _ANSWERS[key]


def _products(packet: Any, tensors: Sequence[Tensor]) -> int:
    """About how many multiplications the operator does."""
    if packet in _ATTENTION:
        return tensors[0].numel() * tensors[2].shape[-2]  # of each query, or its gradient, with every key
    has_bias = packet in (_ATEN.addmm, _ATEN.baddbmm)
    left, right = tensors[1:3] if has_bias else tensors[:2]
    return left.numel() * right.shape[-1]


def _looks(leaf: object) -> object:
    return (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _ask(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    with unset_fake_temporarily(), _disable_current_modes(), torch.no_grad():
        real_args, real_kwargs = tree_map_only(Tensor, _stand_in, (args, kwargs))
        func(*real_args, **real_kwargs)  # what a library makes once and keeps is no part of it
        made: list[Tensor] = []
        highest = highest_bytes(lambda: made.extend(_tensors(func(*real_args, **real_kwargs))))
    return max(0, highest - sum(tensor.untyped_storage().nbytes() for tensor in made))


def _tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def _stand_in(tensor: Tensor) -> Tensor:
    """Zeros of this size; where experts' tokens end: even shares."""
    if not tensor.is_floating_point():
        return torch.arange(1, tensor.numel() + 1, dtype=tensor.dtype)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).zero_()
