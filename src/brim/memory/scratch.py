"""What an operator on a CPU takes from the allocator and gives back before it returns: no output shows it.

Two causes, and two ways to know how much:

- **Casts.** An elementwise operator (TensorIterator) on two formats casts each operand that is not in the common one
  into memory of its own, and a target in another format, too; a sum or mean that works in a wider format than its input
  casts the input. That is a rule, of any size (aten/src/ATen/TensorIterator.cpp, `compute_types`).
- **Kernels of libraries.** oneDNN packs operands of 16-bit matmuls into blocks whose size depends on the processor, and
  attention keeps scores of some rows for each thread. No call says how much, so the operator is asked: it runs once for
  real on zeros of the same shapes, under the profiler, and the answer is kept. Only up to so many multiplications and
  bytes: blocks do not grow without end, and larger operators belong to models of which they are a small share (of a
  product of two BF16 squares of 4096, with one thread: 12 MiB beside operands of 32 each).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import compute_required_storage_length
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from brim.memory.measured import highest_bytes

_MOST_PRODUCTS = 2**31
"""Multiplications of an operator that is run to be asked: some hundredths of a second on one core."""
_MOST_BYTES = 2**26
"""Of its operands and results together, which are large beside the multiplications where one is thin."""
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
        return _asked(func, args, kwargs, out)
    if not isinstance(out, Tensor):
        return 0
    if packet in _REDUCTIONS:
        return _reduction_bytes(packet, args[0], out)
    return _cast_bytes(func, packet, args, out) if _is_elementwise(func) else 0


@cache
def _is_elementwise(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags and func.overloadpacket not in _CASTS_NOTHING


def _cast_bytes(func: Any, packet: Any, args: tuple[Any, ...], out: Tensor) -> int:
    operands = args[packet in _CONDITION_FIRST :]
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    first = tensors[0].dtype
    if first.is_floating_point and out.dtype in (first, torch.bool) and all(each.dtype == first for each in tensors):
        return 0  # nearly always
    common = _common_format(operands)
    if out.dtype.is_floating_point and not common.is_floating_point:
        common = out.dtype  # a fraction, or a root, of integers
    cast = [tensor for tensor in tensors if tensor.dtype != common]
    if func._schema.is_mutable and out.dtype != common:
        cast.append(out)
    return sum(tensor.numel() for tensor in cast) * common.itemsize


def _common_format(operands: Sequence[object]) -> torch.dtype:
    """Tensors decide; numbers (Python's, or tensors without dimensions) where they are of a higher kind than all."""
    common, numbers = torch.bool, list[torch.dtype]()
    for operand in operands:
        if isinstance(operand, Tensor) and operand.dim():
            common = torch.promote_types(common, operand.dtype)
        elif isinstance(operand, Tensor):
            numbers.append(operand.dtype)
        elif isinstance(operand, (int, float)) and not isinstance(operand, bool):
            numbers.append(torch.int64 if isinstance(operand, int) else torch.get_default_dtype())
    for number in numbers:
        if _kind(number) > _kind(common):
            common = number
    return common


def _kind(dtype: torch.dtype) -> int:
    return 2 if dtype.is_floating_point else int(dtype != torch.bool)


def _reduction_bytes(packet: Any, tensor: Tensor, out: Tensor) -> int:
    """The whole input in the format that is worked in, where that is not its own."""
    works_in = out.dtype
    if packet is _ATEN.mean and works_in.itemsize == 2:
        works_in = torch.float32
        return (tensor.numel() + out.numel()) * works_in.itemsize
    return tensor.numel() * works_in.itemsize if works_in != tensor.dtype else 0


def _asked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """What this operator takes on this processor; 0 where it is too large to be run, or a profiler is at work."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    packet = func.overloadpacket
    if packet not in _ATTENTION and not _has_kernel(tensors[0].dtype):
        return 0
    if _products(packet, tensors) > _MOST_PRODUCTS or sum(map(_extent_bytes, (*tensors, *_tensors(out)))) > _MOST_BYTES:
        return 0
    if torch._C._autograd._profiler_enabled():
        return 0
    key = (func, torch.get_num_threads(), *map(_looks, leaves))
    if key not in _ANSWERS:
        _ANSWERS[key] = _ask(func, args, kwargs)
    return _ANSWERS[key]


@cache
def _has_kernel(dtype: torch.dtype) -> bool:
    """oneDNN multiplies this format here: not FP32 (MKL's, whose memory is its own), and 16 bits with AVX-512."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _products(packet: Any, tensors: Sequence[Tensor]) -> int:
    """About how many multiplications the operator does."""
    if packet in _ATTENTION:
        return tensors[0].numel() * tensors[2].shape[-2]  # of each query, or its gradient, with every key
    has_bias = packet in (_ATEN.addmm, _ATEN.baddbmm)
    left, right = tensors[1:3] if has_bias else tensors[:2]
    return left.numel() * right.shape[-1]


def _extent_bytes(tensor: Tensor) -> int:
    return compute_required_storage_length(tensor.shape, tensor.stride(), 0) * tensor.itemsize


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
