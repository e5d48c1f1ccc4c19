"""GGUF's blocks of 32 elements, Q8_0 and Q4_0, and its plain tensors. Shapes: R rows, K elements of a row."""

from collections.abc import Callable

import torch
from torch import Tensor

from brim.checkpoints.conversion import Encoded
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import compare
from brim.numerics.ggml_blocks import BLOCK, decode_blocks, encode_blocks, pack_blocks

WORK_BYTES = 40
"""For each element: in another order, quotient, halves and decoded in FP32, codes, and eight bytes for its bits."""

Arrange = Callable[[Tensor], Tensor]
"""Rows of one or more heads, in the order that the file wants."""


def encode_block_rows(block_RK: Tensor, scratch: Scratch, *, format: str, arrange: Arrange) -> Encoded:
    """Bytes of Q8_0 or Q4_0."""
    arranged_RK = arrange(block_RK)
    blocks = encode_blocks(arranged_RK, format=format)
    decoded_RK = decode_blocks(blocks).view(arranged_RK.shape)
    sums = compare(arranged_RK, decoded_RK, scratch, scale=blocks.scale_N)
    sums.overflowed = BLOCK * int(torch.isinf(blocks.scale_N).sum())
    return Encoded((pack_blocks(blocks, format=format),), sums, lambda: decoded_RK)


def encode_plain_rows(
    block_RK: Tensor, scratch: Scratch, *, dtype: torch.dtype, arrange: Arrange, offset: float
) -> Encoded:
    """In a float format, `offset` added: some families' norms are written as 1 plus what the model holds."""
    arranged_RK = arrange(block_RK)
    if not offset:
        narrow_RK = arranged_RK.to(dtype)
        return Encoded((narrow_RK,), compare(arranged_RK, narrow_RK, scratch), lambda: narrow_RK)
    narrow_RK = (arranged_RK.float() + offset).to(dtype)
    return Encoded((narrow_RK,), compare(arranged_RK, narrow_RK - offset, scratch), lambda: narrow_RK)
