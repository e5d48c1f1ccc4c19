"""INT8 by output channel in the order of torch's CPU kernel for INT4, which reads memory faster than that for INT8.

A code c of -127 to 127 is two nibbles: c + 128 = 16 h + l. The INT4 kernel computes (nibble - 8) * scale + zero in
FP32, with a scale and a zero for each output and group of inputs; so with scale 16 s and zero 8 s for h, s and 0 for l,

    ((h - 8) * 16 s + 8 s) x + ((l - 8) * s) x = c s x,

one product of twice the inputs, [x, x]. Powers of two are exact: the result is the INT8 product, its sum in FP32.
It costs no byte of codes; the kernel's scales are 8 bytes a group of at most 256 inputs, where INT8 has 2 an output.

The kernel's order differs from processor to processor. Here it is 64 outputs side by side, as with AVX-512; whether
this processor's is that one is asked once, and where it is not, weights stay in their own.

Shapes: R outputs, K inputs, T tokens, B blocks of 64 outputs, S groups of both halves of the inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from brim.layers.packing import Int8, Layout, Packing, Tensors

OUTPUTS = 64
"""Of a block."""
_HALF = OUTPUTS // 2
_GROUPS = (256, 128, 64)
"""Inputs that share a scale, as the kernel wants it; in smaller ones scales take an eighth of the codes' bytes."""
_SIGN = 128


def _ordered(codes_RK: Tensor) -> Tensor:
    """(R, K) in the kernel's order, B x 2K x 32: of two outputs 32 apart, the later one's is the higher nibble."""
    rows, inputs = codes_RK.shape
    bytes_BOK = codes_RK.view(torch.uint8).bitwise_xor(_SIGN).view(-1, 2, _HALF, inputs)
    early, late = bytes_BOK[:, 0], bytes_BOK[:, 1]
    high = early.bitwise_right_shift(4).bitwise_or_(late.bitwise_and(0xF0))
    low = early.bitwise_and(15).bitwise_or_(late.bitwise_left_shift(4))
    return torch.cat([high, low], dim=-1).transpose(1, 2).reshape(rows, inputs)


def _is_this_processors() -> bool:
    codes_RK = torch.arange(2 * OUTPUTS * 32).mul_(37).remainder_(255).sub_(127).to(torch.int8).view(-1, 32)
    bytes_RK = codes_RK.view(torch.uint8).bitwise_xor(_SIGN).to(torch.int32)
    nibbles = torch.cat([bytes_RK >> 4, bytes_RK & 15], dim=-1)
    return torch.equal(torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1), _ordered(codes_RK))


# At import: a fake mode, which may be on at the first use, would not give numbers.
IS_KNOWN_ORDER = _is_this_processors()


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Nibbles:
    """`Int8` by output in BF16, its codes as nibbles and its scales as the kernel reads them."""

    @staticmethod
    def fits(packing: Packing, rows: int, inputs: int, dtype: torch.dtype) -> bool:
        """Whether the kernel takes a weight of this shape, in few more bytes."""
        whole = rows % OUTPUTS == 0 and inputs % _GROUPS[-1] == 0
        return IS_KNOWN_ORDER and packing == Int8() and dtype == torch.bfloat16 and whole

    def layout(self, rows: int, inputs: int, dtype: torch.dtype) -> Layout:
        return {
            "weight": ((rows, inputs), torch.uint8),
            "scale": ((2 * inputs // _group_size(inputs), rows, 2), dtype),
        }

    def pack(self, weight_RK: Tensor) -> Tensors:
        return self.rearrange(Int8().pack(weight_RK))

    def rearrange(self, held: Tensors) -> Tensors:
        """What `Int8` holds, in this order."""
        codes_RK, scale_R = held["weight"], held["scale"].view(-1)
        inputs = codes_RK.shape[1]
        high_R2 = torch.stack([scale_R * 16, scale_R * 8], dim=-1)
        low_R2 = torch.stack([scale_R, torch.zeros_like(scale_R)], dim=-1)
        groups = inputs // _group_size(inputs)
        scale_SR2 = torch.cat([part.expand(groups, -1, -1) for part in (high_R2, low_R2)])
        return {"weight": _ordered(codes_RK), "scale": scale_SR2}

    def unpack(self, held: Tensors, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
        codes_KR = _codes(held["weight"], dtype)
        return codes_KR.t().contiguous().mul_(_scale(held)[:, None])

    def product(self, input_TK: Tensor, held: Tensors) -> Tensor:
        """(T, R) by the kernel, which is the faster way for few tokens."""
        return nibbles_product(
            input_TK, weight=held["weight"], scale_SR2=held["scale"].contiguous(), group_size=self.group_size(held)
        )

    def product_by_blocks(self, input_TK: Tensor, held: Tensors, *, elements: int) -> Tensor:
        """(T, R) with so many codes unpacked at a time, whole blocks of them; scales come last."""
        rows, inputs = held["weight"].shape
        at_once = max(1, elements // (inputs * OUTPUTS)) * OUTPUTS
        scale_R = _scale(held)
        result_TR = input_TK.new_empty(len(input_TK), rows)
        for first in range(0, rows, at_once):
            part = slice(first, first + at_once)
            codes_KR = _codes(held["weight"][part], input_TK.dtype)
            torch.mul(input_TK @ codes_KR, scale_R[part], out=result_TR[:, part])
        return result_TR

    def group_size(self, held: Tensors) -> int:
        return _group_size(held["weight"].shape[1])


def nibbles_product(input_TK: Tensor, *, weight: Tensor, scale_SR2: Tensor, group_size: int) -> Tensor:
    """(T, R) of scales that lie whole in memory."""
    # not `repeat`, which takes six times as long: half as long as the product of one token
    return torch._weight_int4pack_mm_for_cpu(torch.cat((input_TK, input_TK), -1), weight, group_size, scale_SR2)


def _group_size(inputs: int) -> int:
    return next(size for size in _GROUPS if inputs % size == 0)


def _scale(held: Tensors) -> Tensor:
    """scale_R: that of a lower nibble."""
    return held["scale"][-1, :, 0]


def _codes(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """codes_KR of whole blocks of outputs, in `dtype`."""
    rows, inputs = weight.shape
    high, low = weight.view(-1, 2, inputs, _HALF).unbind(1)
    early = high.bitwise_left_shift(4).bitwise_or_(low.bitwise_and(15))
    late = high.bitwise_and(0xF0).bitwise_or_(low.bitwise_right_shift(4))
    codes = torch.empty(inputs, len(high), 2, _HALF, dtype=dtype, device=weight.device)
    for place, part in enumerate((early, late)):
        codes[:, :, place] = part.bitwise_xor_(_SIGN).view(torch.int8).transpose(0, 1)
    return codes.view(inputs, rows)
