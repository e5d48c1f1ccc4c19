"""Products with a packed weight where no gradient is asked for: the kernel is chosen by format, shape and device.

- INT8 by output, few rows of input, in BF16 on a CPU: `_weight_int8pack_mm`, which reads each code once. It is the
  faster one up to some 16 rows; its FP32 and FP16 forms are 15 to 60 times slower, and with a K that is no multiple of
  16 it reads past the row's end (torch 2.13), so they are not used.
- INT8 whose inputs are rounded, too: `_int_mm`, integers throughout.
- INT8 as nibbles (`Int8Nibbles`), few rows of input: the INT4 kernel, faster still; more: unpacked without its scales.
- INT4 whose words are in the CPU kernel's order (`Int4Kernel`): `_weight_int4pack_mm_for_cpu`.
- All else, and everything on a GPU: the weight is made anew some rows at a time, and multiplied; never whole.

Shapes: T rows of input, K inputs, R outputs.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from brim.layers.int8_nibbles import Int8Nibbles
from brim.layers.packing import Int4Kernel, Int8, Nf4, Packing, Tensors

_FEW_ROWS = 16
_LANES = 16
_BLOCK_ELEMENTS = 2**20
"""Of a weight that is unpacked at a time: 2 MiB in BF16, which a core's cache holds."""


class Holds(Protocol):
    """Whoever holds a packed weight."""

    @property
    def packing(self) -> Packing: ...

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def held(self) -> Tensors:
        """What holds the weight, by name."""


def product(input: Tensor, bias_R: Tensor | None, holder: Holds, *, compute: torch.dtype) -> Tensor:
    """input @ weight.T + bias in the compute format, and back in the input's."""
    rows, inputs = holder.out_features, holder.in_features
    input_TK = input.to(compute).reshape(-1, inputs)
    result_TR = _product(input_TK, holder.packing, holder.held, rows, compute)
    if bias_R is not None:
        result_TR += bias_R
    return result_TR.view(*input.shape[:-1], rows).to(input.dtype)


def _product(input_TK: Tensor, packing: Packing, held: Tensors, rows: int, compute: torch.dtype) -> Tensor:
    if isinstance(packing, Int8) and packing.group_size is None:
        if packing.rounds_inputs and _has_integer_kernel(input_TK, rows):
            return _of_integers(input_TK, held, compute)
        if 0 < len(input_TK) <= _FEW_ROWS and has_int8_kernel(held["weight"], compute):
            return torch.ops.aten._weight_int8pack_mm(input_TK, held["weight"], held["scale"].view(-1))
    if isinstance(packing, Int8Nibbles):
        if 0 < len(input_TK) <= _FEW_ROWS:
            return packing.product(input_TK, held)
        return packing.product_by_blocks(input_TK, held, elements=_BLOCK_ELEMENTS)
    if isinstance(packing, Int4Kernel):
        return torch._weight_int4pack_mm_for_cpu(
            input_TK.contiguous(), held["weight"], packing.group_size, held["scale"].contiguous()
        )
    return _by_blocks(input_TK, packing, held, rows, compute)


def has_int8_kernel(weight_RK: Tensor, compute: torch.dtype) -> bool:
    """Whether `_weight_int8pack_mm` reads codes of this width where they are, rightly and fast."""
    return weight_RK.device.type == "cpu" and compute == torch.bfloat16 and weight_RK.shape[1] % _LANES == 0


def _has_integer_kernel(input_TK: Tensor, rows: int) -> bool:
    """`_int_mm` on a GPU wants more than 16 rows and whole eights."""
    tokens, inputs = input_TK.shape
    return input_TK.device.type == "cpu" or (tokens > 16 and inputs % 8 == 0 and rows % 8 == 0)


def _of_integers(input_TK: Tensor, held: Tensors, compute: torch.dtype) -> Tensor:
    """Each row of input on a grid of its own, the sums exact, both scales applied to them in FP32."""
    values_TK = input_TK.float()
    scale_T1 = values_TK.abs().amax(dim=-1, keepdim=True).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    codes_TK = values_TK.div_(scale_T1).round_().to(torch.int8)
    sums_TR = torch._int_mm(codes_TK, held["weight"].t()).float()
    return sums_TR.mul_(scale_T1).mul_(held["scale"].view(-1)).to(compute)


def _by_blocks(input_TK: Tensor, packing: Packing, held: Tensors, rows: int, compute: torch.dtype) -> Tensor:
    inputs = input_TK.shape[-1]
    at_once = max(1, _BLOCK_ELEMENTS // inputs)
    # NF4's blocks run across rows, and its operator takes the whole.
    if rows <= at_once or isinstance(packing, Nf4):
        return F.linear(input_TK, packing.unpack(held, rows, inputs, compute))
    result_TR = input_TK.new_empty(input_TK.shape[0], rows)
    for first in range(0, rows, at_once):
        _put_block(result_TR, slice(first, min(first + at_once, rows)), input_TK, packing, held)
    return result_TR


def _put_block(result_TR: Tensor, block: slice, input_TK: Tensor, packing: Packing, held: Tensors) -> None:
    """The product with some rows of the weight, put into the result."""
    part = {name: tensor[block] for name, tensor in held.items()}
    weight_BK = packing.unpack(part, block.stop - block.start, input_TK.shape[1], input_TK.dtype)
    result_TR[:, block] = F.linear(input_TK, weight_BK)
