"""Bytes of a frozen base's packed linear layers, for the estimates. No torch.

The rehearsal does not read this: it makes the modules. A test holds these sizes against theirs (`layers.packing`).
"""

from brim.memory.anatomy import Anatomy, Linear
from brim.recipe import Precision

_BLOCK, _NESTED_BLOCK = 64, 256
_TABLES = 64, 1024 + 4
"""Of each layer: NF4's 16 values; with double quantization, 256 values of scales and their mean."""


def packed_bytes(linear: Linear, precision: Precision) -> int:
    """All that holds a layer's weight, each expert's matrices by themselves, and its scales in the compute format."""
    outputs = linear.outputs // linear.fused
    return linear.experts * linear.fused * matrix_bytes(linear.inputs, outputs, precision)


def matrix_bytes(inputs: int, outputs: int, precision: Precision) -> int:
    """Codes of one matrix, and what belongs to them."""
    numel, scale = inputs * outputs, 4 if precision.compute == "fp32" else 2
    match precision.weights:
        case "int8":
            return numel + scale * outputs
        case "int4":
            return numel // 2 + scale * numel // precision.group_size
        case _:
            blocks = -(-numel // _BLOCK)
            scales = 4 * blocks
            if precision.double_quant:
                scales = blocks + 4 * -(-blocks // _NESTED_BLOCK) + _TABLES[1]
            return (numel + 1) // 2 + scales + _TABLES[0]


def code_bytes(linear: Linear, precision: Precision) -> int:
    """Of them the codes alone, which sharding divides; what belongs to them stays whole on each device."""
    bits = 8 if precision.weights == "int8" else 4
    return linear.experts * linear.fused * ((linear.inputs * (linear.outputs // linear.fused) * bits + 7) // 8)


def packed_linears(parts: Anatomy) -> list[tuple[int, Linear]]:
    """(how many there are, the layer) of each that a packed base packs: what the family keeps in FP32 is left alone."""
    return [
        (stack.num_blocks, linear)
        for stack in parts.stacks
        for linear in stack.block.linears
        if linear.name not in parts.family.unpacked
    ]
