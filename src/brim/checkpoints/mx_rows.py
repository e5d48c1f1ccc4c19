"""MXFP4: 32 elements in FP4 E2M1 that share a power of two. Shapes: R rows, K elements of a row."""

import torch
from torch import Tensor

from brim.checkpoints.conversion import Encoded
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import compare
from brim.numerics.mx_blocks import decode_blocks, encode_blocks, pack_nibbles

WORK_BYTES = 48
"""For each element: scaled, rounded thrice, decoded and error in FP32, codes, and up to eight bytes for its bits."""


def encode_mxfp4(block_RK: Tensor, scratch: Scratch) -> Encoded:
    """Bytes (R, K / 2) and exponents (R, K / 32)."""
    blocks = encode_blocks(block_RK)
    decoded_RK = decode_blocks(blocks)
    scale = torch.exp2(blocks.exponents.float() - 127)
    sums = compare(block_RK, decoded_RK, scratch, clipped=blocks.num_clipped, scale=scale)
    if block_RK.dtype == torch.float64:
        sums.overflowed = max(sums.overflowed, int(torch.isinf(block_RK.float()).sum()))
    return Encoded((pack_nibbles(blocks.codes), blocks.exponents), sums, lambda: decoded_RK)
