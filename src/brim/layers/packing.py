"""How a frozen weight is held packed: NF4 as bitsandbytes holds it, INT8 by output channel, INT4 by group.

A packing names its tensors with their shapes, makes them of a weight, and makes the weight of them. What is made anew
for each matmul is one tensor of the weight's shape in the compute format, and for NF4 the FP32 scales of its blocks
beside it: on a GPU exactly what bitsandbytes allocates, so that a run of QLoRA is rehearsed to the byte.

NF4 runs in bitsandbytes' operators (they exist for CPUs too, and know fake tensors); its own modules quantize when they
are moved to a device, which fake ones never are. Integers run in torch's operators.

Shapes: R outputs, K inputs, N = R * K elements, A blocks of 64 of them, S scales of a row (K / group).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor

from brim.errors import RecipeError
from brim.numerics.encode import absmax_scale
from brim.numerics.formats import FORMATS, NF4_GRID

Tensors = Mapping[str, Tensor]
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> shape and dtype."""

_BLOCK, _NESTED_BLOCK = 64, 256
# At import: a fake mode, which may be on at the first use, would not give numbers.
_NESTED_CODE: tuple[float, ...] = tuple(create_dynamic_map().tolist())


class Packing(Protocol):
    """A format's way of holding a weight. `weight` is the packed codes' name; PEFT looks for it."""

    def layout(self, rows: int, inputs: int, dtype: torch.dtype) -> Layout:
        """The tensors that hold a weight of this shape whose matmuls run in `dtype`. Raises RecipeError."""

    def pack(self, weight_RK: Tensor) -> Tensors:
        """The tensors that hold this weight, whose dtype is the one that matmuls run in."""

    def unpack(self, held: Tensors, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
        """weight_RK in `dtype`, anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4:
    """4-bit codes of a normal distribution's quantiles, an absmax for each 64 elements (QLoRA, arXiv:2305.14314).

    `nested`: each absmax is 8 bits about their mean, with an FP32 absmax for 256 of them (double quantization).
    """

    nested: bool

    def layout(self, rows: int, inputs: int, dtype: torch.dtype) -> Layout:
        numel = rows * inputs
        blocks = -(-numel // _BLOCK)
        held: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": (((numel + 1) // 2, 1), torch.uint8),
            "absmax": ((blocks,), torch.uint8 if self.nested else torch.float32),
            "code": ((len(NF4_GRID),), torch.float32),
        }
        if self.nested:
            held["nested_absmax"] = ((-(-blocks // _NESTED_BLOCK),), torch.float32)
            held["nested_code"] = ((len(_NESTED_CODE),), torch.float32)
            held["offset"] = ((), torch.float32)
        return held

    def pack(self, weight_RK: Tensor) -> Tensors:
        codes, absmax_A = torch.ops.bitsandbytes.quantize_4bit(weight_RK, _BLOCK, "nf4", torch.uint8)
        held = {"weight": codes, "absmax": absmax_A, "code": _table(NF4_GRID, weight_RK)}
        if self.nested:
            offset, code = absmax_A.mean(), _table(_NESTED_CODE, weight_RK)
            absmax_A, nested_absmax = torch.ops.bitsandbytes.quantize_blockwise(absmax_A - offset, code, _NESTED_BLOCK)
            held |= {"absmax": absmax_A, "nested_absmax": nested_absmax, "nested_code": code, "offset": offset}
        return held

    def unpack(self, held: Tensors, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
        absmax_A = held["absmax"]
        if self.nested:
            absmax_A = torch.ops.bitsandbytes.dequantize_blockwise(
                absmax_A, held["nested_absmax"], held["nested_code"], _NESTED_BLOCK, torch.float32
            )
            absmax_A += held["offset"]
        # As one row: bitsandbytes 0.50.2 on a CPU with AVX-512 scales blocks that reach past a row's end by another
        # block's absmax (any K that is not a multiple of 64); a test holds every shape.
        weight_N: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            held["weight"], absmax_A, _BLOCK, "nf4", (1, rows * inputs), dtype
        )
        return weight_N.view(rows, inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """Codes of 8 bits and a scale for each output. The scale is in the compute format: no FP32 product is made."""

    group_size: int | None = None
    """Inputs that share a scale; None: all of an output's."""
    rounds_inputs: bool = False
    """Where no gradient is asked for, inputs are rounded to 8 bits row by row and the product is one of integers."""

    def layout(self, rows: int, inputs: int, dtype: torch.dtype) -> Layout:
        groups = inputs // (self.group_size or inputs)
        return {"weight": ((rows, inputs), torch.int8), "scale": ((rows, groups), dtype)}

    def pack(self, weight_RK: Tensor) -> Tensors:
        codes, scale = _encode(weight_RK, "int8", self.group_size or weight_RK.shape[1])
        return {"weight": codes, "scale": scale}

    def unpack(self, held: Tensors, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
        return _times_groups(held["weight"].to(dtype), held["scale"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """FP8 E4M3 elements and a scale for each output."""

    def layout(self, rows: int, inputs: int, dtype: torch.dtype) -> Layout:
        return {"weight": ((rows, inputs), torch.float8_e4m3fn), "scale": ((rows, 1), dtype)}

    def pack(self, weight_RK: Tensor) -> Tensors:
        values = weight_RK.float()
        scale = absmax_scale(values, largest_code=FORMATS["fp8_e4m3"].largest, dtype=weight_RK.dtype)
        return {"weight": (values / scale.float()).to(torch.float8_e4m3fn), "scale": scale}

    def unpack(self, held: Tensors, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
        return _times_groups(held["weight"].to(dtype), held["scale"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4:
    """Symmetric codes of 4 bits, eight in an int32 along a row, and a scale for each group of inputs.

    As compressed-tensors' pack-quantized holds them; GPTQ packs down a column, in as many bytes.
    """

    group_size: int

    def layout(self, rows: int, inputs: int, dtype: torch.dtype) -> Layout:
        if inputs % self.group_size or inputs % 8:
            fitting = min(128, inputs & -inputs)
            nearest = f"precision.group_size = {fitting}" if fitting >= 8 else 'precision.weights = "nf4"'
            raise RecipeError(
                f"precision.group_size = {self.group_size} does not divide a linear layer's {inputs} inputs into whole "
                f"groups and words; nearest: {nearest}"
            )
        return {
            "weight": ((rows, inputs // 8), torch.int32),
            "scale": ((rows, inputs // self.group_size), dtype),
        }

    def pack(self, weight_RK: Tensor) -> Tensors:
        codes_RK, scale_RS = _encode(weight_RK, "int4", self.group_size)
        nibbles_RK = (codes_RK + 8).to(torch.uint8)
        return {"weight": (nibbles_RK[:, ::2] | nibbles_RK[:, 1::2] << 4).view(torch.int32), "scale": scale_RS}

    def unpack(self, held: Tensors, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
        pairs = held["weight"].view(torch.uint8)  # little-endian: the lower nibble is the earlier input
        weight = torch.empty(rows, inputs // 2, 2, dtype=dtype, device=pairs.device)
        weight[..., 0] = pairs & 15
        weight[..., 1] = pairs >> 4
        groups = weight.sub_(8).view(rows, -1, self.group_size)
        return groups.mul_(held["scale"][..., None]).view(rows, inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Words:
    """Codes of 8 bits plus 128, four in an int32 along a row: compressed-tensors' pack-quantized, as files hold it."""

    group_size: int | None

    def layout(self, rows: int, inputs: int, dtype: torch.dtype) -> Layout:
        groups = inputs // (self.group_size or inputs)
        return {"weight": ((rows, inputs // 4), torch.int32), "scale": ((rows, groups), dtype)}

    def pack(self, weight_RK: Tensor) -> Tensors:
        held = Int8(group_size=self.group_size).pack(weight_RK)
        return {**held, "weight": held["weight"].view(torch.uint8).bitwise_xor(128).view(torch.int32)}

    def unpack(self, held: Tensors, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
        return self.rearranged().unpack(self.rearrange(held), rows, inputs, dtype)

    def rearranged(self) -> Int8:
        """The same codes, one a byte."""
        return Int8(group_size=self.group_size)

    def rearrange(self, held: Tensors) -> Tensors:
        """What `rearranged` holds of it."""
        return {**held, "weight": held["weight"].view(torch.uint8).bitwise_xor(128).view(torch.int8)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Absmax:
    """Codes of 8 bits and 127 times the scale of each output, in FP32: bitsandbytes' INT8, as files hold it."""

    def layout(self, rows: int, inputs: int, dtype: torch.dtype) -> Layout:
        return {"weight": ((rows, inputs), torch.int8), "absmax": ((rows,), torch.float32)}

    def pack(self, weight_RK: Tensor) -> Tensors:
        held = Int8().pack(weight_RK.float())
        return {"weight": held["weight"], "absmax": held["scale"].view(-1) * 127}

    def unpack(self, held: Tensors, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
        return _times_groups(held["weight"].to(dtype), self._scale(held, dtype))

    def rearranged(self) -> Int8:
        return Int8()

    def rearrange(self, held: Tensors, dtype: torch.dtype) -> Tensors:
        """What `rearranged` holds of it."""
        return {"weight": held["weight"], "scale": self._scale(held, dtype)}

    def _scale(self, held: Tensors, dtype: torch.dtype) -> Tensor:
        return (held["absmax"] / 127).unsqueeze(-1).to(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Shifted:
    """Codes of 8 bits, a scale and a code that means 0 for each output or group: torchao's INT8, as files hold it."""

    group_size: int | None

    def layout(self, rows: int, inputs: int, dtype: torch.dtype) -> Layout:
        groups = inputs // (self.group_size or inputs)
        return {
            "weight": ((rows, inputs), torch.int8),
            "scale": ((rows, groups), dtype),
            "zero": ((rows, groups), torch.int8),
        }

    def pack(self, weight_RK: Tensor) -> Tensors:
        held = Int8(group_size=self.group_size).pack(weight_RK)
        return {**held, "zero": torch.zeros_like(held["scale"], dtype=torch.int8)}

    def unpack(self, held: Tensors, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
        zero_RS = held["zero"]
        shifted = held["weight"].to(dtype).unflatten(-1, (zero_RS.shape[1], -1)).sub_(zero_RS[..., None])
        return _times_groups(shifted.flatten(-2), held["scale"])

    def rearranged(self, held: Tensors) -> "Int8 | Int8Shifted":
        """The same codes without zeros, where all are 0, as of symmetric formats."""
        return self if bool(held["zero"].any()) else Int8(group_size=self.group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Kernel:
    """`Int4` in BF16 with its codes and scales in the order of torch's CPU kernel: as many bytes of codes, and a zero
    beside each scale."""

    group_size: int

    @staticmethod
    def fits(packing: Packing, rows: int, inputs: int, dtype: torch.dtype) -> bool:
        """Whether the kernel takes a weight of this shape."""
        suits = isinstance(packing, Int4) and packing.group_size in (32, 64, 128, 256)
        return suits and dtype == torch.bfloat16 and rows % 16 == 0

    def layout(self, rows: int, inputs: int, dtype: torch.dtype) -> Layout:
        return {
            "weight": ((rows, inputs // 2), torch.uint8),
            "scale": ((inputs // self.group_size, rows, 2), dtype),
        }

    def pack(self, weight_RK: Tensor) -> Tensors:
        return self.rearrange(Int4(group_size=self.group_size).pack(weight_RK))

    def unpack(self, held: Tensors, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
        # The order of the codes differs from processor to processor: the kernel alone knows it.
        identity_KK = torch.eye(inputs, dtype=torch.bfloat16, device=held["weight"].device)
        weight_KR = torch.ops.aten._weight_int4pack_mm_for_cpu(
            identity_KK, held["weight"], self.group_size, held["scale"].contiguous()
        )
        return weight_KR.t().to(dtype).contiguous()

    def rearrange(self, held: Tensors) -> Tensors:
        """What `Int4` holds, in this order."""
        pairs = held["weight"].view(torch.uint8)
        nibbles_RK = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1).to(torch.int32)
        scale_SR = held["scale"].t()
        return {
            "weight": torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles_RK, 1),
            "scale": torch.stack([scale_SR, torch.zeros_like(scale_SR)], dim=-1),
        }


def _times_groups(weight_RK: Tensor, scale_RS: Tensor) -> Tensor:
    """In place: each run of K / S inputs times its scale."""
    if scale_RS.shape[1] == 1:
        return weight_RK.mul_(scale_RS)
    weight_RK.unflatten(-1, (scale_RS.shape[1], -1)).mul_(scale_RS[..., None])
    return weight_RK


def _encode(weight_RK: Tensor, format: str, group_size: int) -> tuple[Tensor, Tensor]:
    """`numerics.encode_integer` without its count, for which it reads numbers: fake tensors have none."""
    low, high = FORMATS[format].codes
    groups = weight_RK.float().unflatten(-1, (-1, group_size))
    scale = absmax_scale(groups, largest_code=high, dtype=weight_RK.dtype)
    codes = (groups / scale.float()).round_().clamp_(low, high).to(torch.int8)
    return codes.view(weight_RK.shape), scale.squeeze(-1)


def _table(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def held_bytes(packing: Packing, rows: int, inputs: int, dtype: Any) -> int:
    """Bytes of the tensors that hold a weight of this shape."""
    layout = packing.layout(rows, inputs, dtype).values()
    return sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in layout)
