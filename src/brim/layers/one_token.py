"""One token through packed layers, as decoding asks: straight to the kernel, and once for layers that read one input.

At one token a product takes some 10 microseconds, as long as choosing its kernel does; so the choice is made once, when
the model is loaded. Queries, keys and values read one input, and so do a gate and what it gates: their rows lie one
after the other in one tensor, of which each layer's weight is a view, so that names, shapes and saved files stay as
they were. The layer that is asked first multiplies by all rows; the others are handed their part.

Which layers read one input is a guess by their names, and only a guess: a part is handed out for the very tensor that
was multiplied, unchanged since, and otherwise the product is computed.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from brim.layers.int8_nibbles import IS_KNOWN_ORDER, OUTPUTS, Int8Nibbles, nibbles_product
from brim.layers.packed_linear import PackedLinear
from brim.layers.packing import Int4Kernel, Int8, Packing, Tensors
from brim.layers.products import has_int8_kernel

Multiply = Callable[[Tensor], Tensor]
"""(1, K) -> (1, R)."""

_READ_ONE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wi_0", "wi_1"),
)


class OneToken:
    """The product of layers that read one input; it remembers the last until all have had their part."""

    def __init__(self, layers: Sequence[PackedLinear], multiply: Multiply) -> None:
        self._multiply = multiply
        self._inputs, self._dtype = layers[0].in_features, layers[0].compute
        self._rows = [layer.out_features for layer in layers]
        self._input: Tensor | None = None
        self._version = 0
        self._parts: list[Tensor | None] = []
        for place, layer in enumerate(layers):
            layer.one_token = partial(self._part, place)

    def _part(self, place: int, input: Tensor) -> Tensor | None:
        """What this layer makes of the input, its bias left out; None where it is not one token in the right format."""
        if input.numel() != self._inputs or input.dtype != self._dtype:
            return None
        if len(self._rows) == 1:
            return self._product(input)
        if input.is_inference():  # says nothing of its version
            return self._product(input).split(self._rows, -1)[place]
        if input is not self._input or input._version != self._version or self._parts[place] is None:
            self._parts = [*self._product(input).split(self._rows, -1)]
            self._input, self._version = input, input._version
        part, self._parts[place] = self._parts[place], None
        if all(part is None for part in self._parts):
            self._input = None
        return part

    def _product(self, input: Tensor) -> Tensor:
        return self._multiply(input.view(1, -1)).view(*input.shape[:-1], -1)


def prepare_one_token(model: nn.Module) -> None:
    """Give each packed layer whose weight a kernel reads as it lies its way for one token."""
    ready: set[PackedLinear] = set()
    for parent in model.modules():
        for names in _READ_ONE_INPUT:
            layers = [layer for name in names if isinstance(layer := getattr(parent, name, None), PackedLinear)]
            if len(layers) == len(names) and _can_join(layers):
                _join(layers)
                ready.update(layers)
    for layer in model.modules():
        if isinstance(layer, PackedLinear) and layer not in ready and (multiply := _kernel(layer)):
            OneToken([layer], multiply)


def _can_join(layers: Sequence[PackedLinear]) -> bool:
    alike = {(layer.in_features, layer.compute, layer.packing, layer.held["weight"].device) for layer in layers}
    if len(alike) > 1 or _kernel(layers[0]) is None:
        return False
    # rows of INT4 lie in whole blocks of the kernel's
    return not isinstance(layers[0].packing, Int4Kernel) or (
        IS_KNOWN_ORDER and all(layer.out_features % OUTPUTS == 0 for layer in layers)
    )


def _join(layers: Sequence[PackedLinear]) -> None:
    """Two tensors for all; at any time one set of layers is held twice."""
    first, rows = layers[0], [layer.out_features for layer in layers]
    # scales are (R, 1), or (S, R, 2) for the INT4 kernel
    dims = {"weight": 0, "scale": first.held["scale"].ndim - 2}
    joined = {name: torch.cat([layer.held[name] for layer in layers], dim=dim) for name, dim in dims.items()}
    codes, scales = (joined[name].split(rows, dim) for name, dim in dims.items())
    for layer, weight, scale in zip(layers, codes, scales, strict=True):
        layer.hold({"weight": weight, "scale": scale})
    multiply = _multiply(first.packing, joined, first.compute)
    assert multiply is not None
    OneToken(layers, multiply)


def _kernel(layer: PackedLinear) -> Multiply | None:
    return _multiply(layer.packing, layer.held, layer.compute)


def _multiply(packing: Packing, held: Tensors, compute: torch.dtype) -> Multiply | None:
    if packing == Int8() and has_int8_kernel(held["weight"], compute):
        return partial(_int8_product, held["weight"], held["scale"].view(-1))
    if isinstance(packing, Int8Nibbles):
        group_size = packing.group_size(held)
        return partial(
            nibbles_product, weight=held["weight"], scale_SR2=held["scale"].contiguous(), group_size=group_size
        )
    if isinstance(packing, Int4Kernel):
        scale_SR2 = held["scale"].contiguous()
        return partial(_int4_product, weight=held["weight"], scale_SR2=scale_SR2, group_size=packing.group_size)
    return None


def _int8_product(weight_RK: Tensor, scale_R: Tensor, input_1K: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(input_1K, weight_RK, scale_R)


def _int4_product(input_1K: Tensor, *, weight: Tensor, scale_SR2: Tensor, group_size: int) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(input_1K, weight, group_size, scale_SR2)
