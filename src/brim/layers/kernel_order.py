"""The same packed weight in another order: as training holds it, and as a kernel of this device reads it fastest."""

import torch

from brim.layers.int8_nibbles import Int8Nibbles
from brim.layers.packing import Int4, Int4Kernel, Int8Absmax, Int8Shifted, Int8Words, Packing, Tensors


def settled(packing: Packing, held: Tensors, dtype: torch.dtype) -> tuple[Packing, Tensors]:
    """INT8 as layouts of others hold it, one code a byte; all else as it is."""
    if isinstance(packing, Int8Words):
        return packing.rearranged(), packing.rearrange(held)
    if isinstance(packing, Int8Absmax):
        return packing.rearranged(), packing.rearrange(held, dtype)
    if isinstance(packing, Int8Shifted):
        plain = packing.rearranged(held)
        return plain, held if plain is packing else {name: held[name] for name in ("weight", "scale")}
    return packing, held


def for_kernel(packing: Packing, held: Tensors, rows: int, inputs: int, dtype: torch.dtype) -> tuple[Packing, Tensors]:
    """As a kernel wants it, where one wants it otherwise; backward would unpack it slowly."""
    packing, held = settled(packing, held, dtype)
    if held["weight"].device.type != "cpu":
        return packing, held
    if isinstance(packing, Int4) and Int4Kernel.fits(packing, rows, inputs, dtype):
        kernel = Int4Kernel(group_size=packing.group_size)
        return kernel, kernel.rearrange(held)
    if Int8Nibbles.fits(packing, rows, inputs, dtype):
        return Int8Nibbles(), Int8Nibbles().rearrange(held)
    return packing, held
