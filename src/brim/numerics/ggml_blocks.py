"""Q8_0 and Q4_0 as ggml stores them: 32 elements of a row share an FP16 scale that lies before their codes.

Scales and codes are those of ggml's reference quantizer (ggml-quants.c) and of gguf-py, bit by bit: codes are made with
the scale before it is rounded to FP16, Q8_0's halves go away from zero, Q4_0's grid is laid so that the element of
largest size, with its sign, is code -8.
Shapes: R rows, K elements of a row, N blocks, B = 32 elements of one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32
BYTES = {"q8_0": 34, "q4_0": 18}
"""Of one block."""
_JUST_BELOW_HALF = 0.49999997  # the float before 0.5: adding 0.5 itself would carry it, too, to 1


class Blocks(NamedTuple):
    """Decoded, an element is `codes * scale`."""

    codes_NB: Tensor
    """int8."""
    scale_N: Tensor
    """fp16; Inf where a block's scale is past FP16's largest."""


def encode_blocks(values_RK: Tensor, *, format: str) -> Blocks:
    """Codes and scales of rows whose length is a multiple of 32."""
    values_NB = values_RK.float().reshape(-1, BLOCK)
    return _encode_q8_0(values_NB) if format == "q8_0" else _encode_q4_0(values_NB)


def decode_blocks(blocks: Blocks) -> Tensor:
    """fp32, (N, B)."""
    return blocks.codes_NB.float() * blocks.scale_N.float().unsqueeze(-1)


def pack_blocks(blocks: Blocks, *, format: str) -> Tensor:
    """uint8, (N, 34) or (N, 18)."""
    codes_NB, scale_N = blocks
    packed = torch.empty(len(scale_N), BYTES[format], dtype=torch.uint8)
    packed[:, :2] = scale_N.view(torch.uint8).view(-1, 2)
    if format == "q8_0":
        packed[:, 2:] = codes_NB.view(torch.uint8)
    else:
        nibbles_NB = codes_NB.add(8).view(torch.uint8)
        packed[:, 2:] = nibbles_NB[:, : BLOCK // 2] | nibbles_NB[:, BLOCK // 2 :] << 4
    return packed


def unpack_blocks(packed: Tensor, *, format: str) -> Blocks:
    """What `pack_blocks` packed, of bytes in any shape."""
    packed = packed.reshape(-1, BYTES[format])
    scale_N = packed[:, :2].contiguous().view(torch.float16).squeeze(-1)
    if format == "q8_0":
        return Blocks(packed[:, 2:].contiguous().view(torch.int8), scale_N)
    nibbles_NB = torch.cat((packed[:, 2:] & 15, packed[:, 2:] >> 4), dim=1)
    return Blocks(nibbles_NB.view(torch.int8) - 8, scale_N)


def _encode_q8_0(values_NB: Tensor) -> Blocks:
    scale_N = torch.maximum(values_NB.amax(dim=-1), values_NB.amin(dim=-1).neg_()) / 127
    scaled_NB = values_NB * _inverse(scale_N).unsqueeze(-1)
    codes_NB = scaled_NB.add_(torch.full_like(scaled_NB, _JUST_BELOW_HALF).copysign_(scaled_NB)).trunc_()
    return Blocks(codes_NB.to(torch.int8), scale_N.half())


def _encode_q4_0(values_NB: Tensor) -> Blocks:
    largest_N, least_N = values_NB.amax(dim=-1), values_NB.amin(dim=-1)
    top_N = torch.where(largest_N > -least_N, largest_N, least_N)
    # Of two elements of equal size and other sign, the first one counts.
    tied = (largest_N == -least_N) & (largest_N != 0)
    if bool(tied.any()):
        first = values_NB[tied].abs().argmax(dim=-1, keepdim=True)
        top_N[tied] = values_NB[tied].gather(1, first).squeeze(-1)
    scale_N = top_N / -8
    # Not rounded but cut off after adding 8.5, as the reference does; the largest of the other sign may come to 16.
    codes_NB = (values_NB * _inverse(scale_N).unsqueeze(-1)).add_(8.5).trunc_().clamp_(0, 15).sub_(8)
    return Blocks(codes_NB.to(torch.int8), scale_N.half())


def _inverse(scale_N: Tensor) -> Tensor:
    """1 / scale; 0 where that is no number, as of scales that FP16 holds as 0 anyway."""
    inverse_N = scale_N.reciprocal()
    return torch.where(torch.isfinite(inverse_N), inverse_N, torch.zeros_like(inverse_N))
