"""A linear layer whose frozen weight stays packed in memory, forward and backward.

Each matmul makes the weight anew and drops it; nothing of the weight's size is kept for backward, and since the weight
is not trained, neither is the input.

Where no gradient is asked for, `layers.products` chooses a kernel that reads the packed weight itself.

How this differs from bitsandbytes' Linear4bit: it can be built on meta and fake tensors, holds any `Packing`, and says
what it holds as plain buffers. Shapes: R outputs, K inputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brim.layers.kernel_order import for_kernel, settled
from brim.layers.packing import Packing, Tensors
from brim.layers.products import Holds, product


class PackedLinear(nn.Linear):
    """`nn.Linear` to whoever asks (PEFT does), with `weight` the packed codes and the rest beside it."""

    _is_hf_initialized: bool
    """transformers' mark: its initializers, which want floats, keep away."""
    holds_input = False
    """Whether its products are bitsandbytes 0.42's (`_HeldProduct`)."""
    multiplies_whole: bool = False
    """Whether its weight is made anew in one piece without gradients, too: before a reentrant checkpoint's backward,
    which needs the room anyway, pieces would be many small kernels for nothing."""
    is_stored_packed = False
    """Whether its file holds what it holds: nothing is packed as it is loaded."""
    is_tied: bool = False
    """Whether it holds what the embedding holds."""
    one_token: Callable[[Tensor], Tensor | None] | None = None
    """Its product where no gradient is asked for, without bias; None of an input that it does not suit
    (`layers.one_token`)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: nn.Parameter | None,
        packing: Packing,
        compute: torch.dtype,
        device: torch.device,
        transposed: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.transposed = transposed
        """Whether files hold the weight as K x R (GPT-2 does); here it is R x K."""
        self.in_features, self.out_features = inputs, outputs
        self.packing, self.compute = packing, compute
        layout = packing.layout(outputs, inputs, compute)
        self.hold({name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in layout.items()})
        self.bias = bias  # type: ignore[assignment]  # nn.Linear's own says Parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Moved tensors are other ones than those that `one_token` reads."""
        self.one_token = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def held(self) -> Tensors:
        """What holds the weight, by name."""
        return {name: getattr(self, name) for name in self._held}

    def hold(self, tensors: Tensors) -> None:
        """These hold the weight from now on."""
        self.one_token = None
        self._held = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def packed(self, weight_RK: Tensor) -> Tensors:
        """What holds this weight, given as files hold it."""
        return self.packing.pack((weight_RK.T.contiguous() if self.transposed else weight_RK).to(self.compute))

    def pack(self, weight_RK: Tensor) -> None:
        """Hold this weight from now on."""
        self.hold(self.packing.pack(weight_RK.to(self.compute)))

    def settle(self) -> None:
        """Hold the weight in a form of ours, if its file has it in one of others."""
        self._hold_as(*settled(self.packing, self.held, self.compute))

    def rearrange(self) -> None:
        """Hold the weight in the order that a kernel of this device wants, if there is one."""
        # what an embedding holds as well stays in rows
        if not self.is_tied:
            self._hold_as(*for_kernel(self.packing, self.held, self.out_features, self.in_features, self.compute))

    def _hold_as(self, packing: Packing, held: Tensors) -> None:
        self.packing = packing
        for name in self.held.keys() - held.keys():
            del self._buffers[name]
        self.hold(held)

    def make_codes_divisible(self) -> None:
        """Codes become a frozen parameter, which sharding divides; scales, a hundredth of them, stay whole."""
        codes_to_parameters(self, ("weight",))

    def unpacked(self) -> Tensor:
        """weight_RK in the compute format, anew."""
        return self.packing.unpack(self.held, self.out_features, self.in_features, self.compute)

    def forward(self, input: Tensor) -> Tensor:
        """In the compute format, and back in the input's."""
        if self.one_token is not None and not torch.is_grad_enabled():
            result = self.one_token(input)
            if result is not None:
                return result if self.bias is None else result + self.bias.to(self.compute)
        bias = None if self.bias is None else self.bias.to(self.compute)
        if self.holds_input and torch.is_grad_enabled():
            held: Tensor = _HeldProduct.apply(input.to(self.compute), bias, self)  # type: ignore[no-untyped-call]
            return held.to(input.dtype)
        return packed_product(input, bias, self, compute=self.compute, whole=self.multiplies_whole)


def codes_to_parameters(module: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        codes = module._buffers.pop(name)
        assert codes is not None
        module.register_parameter(name, nn.Parameter(codes, requires_grad=False))


def packed_product(input: Tensor, bias_R: Tensor | None, held: Holds, *, compute: torch.dtype, whole: bool) -> Tensor:
    """input @ weight.T + bias in the compute format, and back in the input's.

    `whole`: made anew in one piece, without gradients, too.
    """
    if not (whole or torch.is_grad_enabled()):
        return product(input, bias_R, held, compute=compute)
    result: Tensor = _PackedProduct.apply(input.to(compute), bias_R, held, compute)  # type: ignore[no-untyped-call]
    return result.to(input.dtype)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, bias_R: Tensor | None, held: Holds, compute: torch.dtype) -> Tensor:
        tensors = held.held
        ctx.unpack = partial(_unpacked, held.packing, held.out_features, held.in_features, compute, tuple(tensors))
        # not by way of the layer, whose tensors may be elsewhere by then: autograd knows where
        ctx.save_for_backward(*tensors.values())
        return F.linear(input, ctx.unpack(*tensors.values()), bias_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_input = grad @ ctx.unpack(*ctx.saved_tensors) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_input, grad_bias, None, None


def _unpacked(
    packing: Packing, rows: int, inputs: int, compute: torch.dtype, names: tuple[str, ...], *tensors: Tensor
) -> Tensor:
    return packing.unpack(dict(zip(names, tensors, strict=True)), rows, inputs, compute)


class _HeldProduct(torch.autograd.Function):
    """bitsandbytes 0.42, autograd/_functions.py, MatMul4Bit: the input is an attribute of the node (not a saved tensor,
    which backward would free), so it lives as long as the graph; the weight was packed from FP16, comes back in it, and
    is cast."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias_R: Tensor | None, held: PackedLinear) -> Tensor:
        result = F.linear(input, _by_way_of_fp16(held), bias_R)
        ctx.packed = held
        ctx.input = input if ctx.needs_input_grad[0] else None
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_bias = grads[0].flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad_input = grads[0] @ _by_way_of_fp16(ctx.packed) if ctx.needs_input_grad[0] else None
        return grad_input, grad_bias, None


def _by_way_of_fp16(held: PackedLinear) -> Tensor:
    """weight_RK in the compute format."""
    return held.packing.unpack(held.held, held.out_features, held.in_features, torch.float16).to(held.compute)
