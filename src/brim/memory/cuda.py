"""What a step allocates on CUDA and not on a CPU, on fake CPU tensors (fake CUDA tensors need a build with CUDA).

1. Attention runs in fused kernels. FlashAttention keeps q, k, v, its output and an FP32 log-sum-exp of each row and
   head; its backward accumulates dq in FP32 and expands dk and dv to the query heads (flash-attention,
   csrc/flash_attn/flash_api.cpp, which torch carries). The memory-efficient kernel (a mask, FP32, or a device before
   Ampere) keeps the same and accumulates dq; neither takes grouped heads with it: then scores are materialized.
2. Dropout keeps a mask of booleans, not of numbers in the input's format.
3. AdamW with states of 8 bits is one kernel.
4. Each thread's cuBLAS handle takes a workspace after the result of its first matrix product: forward's and the
   autograd engine's.
5. Autocast runs layer norms, softmax and cross-entropies in FP32, inputs and results (aten/autocast_mode.h, the
   operators listed for CUDA), which it does not on a CPU.
6. Fused norms and turned queries are one kernel each, which allocates its results alone and in backward writes over
   the gradient (unsloth, kernels/rms_layernorm.py and rope_embedding.py; Liger, ops/rms_norm.py).

Ignored: others of that list (powers, sums), which models ask for in FP32 anyway.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from brim.hardware import Device
from brim.layers import blockwise_adam, fused
from brim.layers.one_kernel import one_kernel
from brim.memory.constants import cublas_workspace_bytes
from brim.memory.lifetimes import LifetimeMeter
from brim.memory.trace import Trace

_LARGEST_HEAD = 256
"""Elements of a head that FlashAttention takes."""
_AMPERE = 8
_HALF = (torch.bfloat16, torch.float16)
_PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default,
    }
)


@contextmanager
def cuda_kernels(device: Device, meter: LifetimeMeter) -> Iterator[None]:
    """Inside a fake world: operators allocate as on this device, which need not be here."""
    modern = device.compute_major is None or device.compute_major >= _AMPERE  # ROCm has FlashAttention, too
    with (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention(modern)),
        mock.patch("torch.nn.functional.dropout", _dropout),
        _widening(),
        mock.patch.object(blockwise_adam, "has_kernel", lambda device: True),
        mock.patch.multiple(fused, norm=_norm, norm_backward=_norm_backward, turn=_turn),
        mock.patch.object(meter, "inside", CublasWorkspaces(cublas_workspace_bytes(device), meter.trace)),
    ):
        yield


@contextmanager
def _widening() -> Iterator[None]:
    with ExitStack() as stack:
        for name in ("layer_norm", "softmax", "log_softmax", "cross_entropy"):
            function = getattr(torch.nn.functional, name)
            stack.enter_context(mock.patch(f"torch.nn.functional.{name}", _widened(function)))
        yield


def _widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same, its 16-bit arguments in FP32 under autocast."""

    @wraps(function)
    def in_fp32(*given: Any, **named: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return function(*given, **named)
        wide = [_as_fp32(value) for value in given]
        return function(*wide, **{name: _as_fp32(value) for name, value in named.items()})

    return in_fp32


def _as_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value


@one_kernel
def _norm(hidden: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), hidden.new_empty((*hidden.shape[:-1], 1), dtype=torch.float32)


@one_kernel
def _norm_backward(
    gradient: Tensor, hidden: Tensor, weight_H: Tensor, rstd: Tensor, *, trains_weight: bool
) -> tuple[Tensor, Tensor | None]:
    return gradient, torch.empty_like(weight_H) if trains_weight else None


@one_kernel
def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Written over."""
    return states


class CublasWorkspaces:
    """Takes a workspace at the first matrix product of forward and at the first of backward, and keeps both.

    A mode of its own would be one reference more than `fake.AccumulateInPlace` has counted: the meter calls it.
    """

    def __init__(self, nbytes: int, trace: Trace) -> None:
        self._nbytes = nbytes
        self._trace = trace
        self._threads: set[bool] = set()

    def __call__(self, func: object, *_: object) -> int:
        """Once the product has its result. Nothing more is needed while it runs."""
        if func in _PRODUCTS:
            backward = torch._C._current_graph_task_id() != -1
            if backward not in self._threads:
                self._threads.add(backward)
                self._trace.allocate(self._nbytes, "workspace")
        return 0


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout` as CUDA does it."""
    if not training or p == 0:
        return input
    out: Tensor = _Dropout.apply(input, p)  # type: ignore[no-untyped-call]
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(torch.empty_like(input, dtype=torch.bool))
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return torch.empty_like(gradients[0]), None


def _attention(modern: bool) -> Callable[..., Tensor]:
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The kernel that CUDA's `scaled_dot_product_attention` chooses (aten/native/transformers/cuda/sdp_utils)."""
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
        half = query.dtype in (torch.bfloat16, torch.float16)
        small_head = query.shape[-1] == value.shape[-1] <= _LARGEST_HEAD
        flash = modern and half and attn_mask is None and small_head
        if not flash and not (
            torch.backends.cuda.math_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()
        ):
            raise RuntimeError("No available kernel. Aborting execution.")  # as torch says it
        if not flash and enable_gqa and key.shape[1] != query.shape[1]:
            return torch._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
            )[0]
        return cast(Tensor, _FusedAttention.apply(query, key, value, attn_mask, flash))  # type: ignore[no-untyped-call]

    return scaled_dot_product_attention


class _FusedAttention(torch.autograd.Function):
    """Sizes alone. Shapes: B rows, H query heads, T queries, S keys, D head."""

    @staticmethod
    def forward(
        ctx: Any, query_BHTD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, mask: Tensor | None, flash: bool
    ) -> Tensor:
        rows, heads, tokens, _ = query_BHTD.shape
        # FlashAttention's output lies in memory as q does; the efficient kernel's, with its heads side by side
        out_BHTD = (
            torch.empty_like(query_BHTD)
            if flash
            else query_BHTD.new_empty(rows, tokens, heads, value_BHSD.shape[-1]).transpose(1, 2)
        )
        # the efficient kernel's log-sum-exps are aligned to 32 (kAlignLSE)
        lse_tokens = tokens if flash else _rounded(tokens, 32)
        lse_BHT = query_BHTD.new_empty(rows, heads, lse_tokens, dtype=torch.float32)
        ctx.flash = flash
        ctx.save_for_backward(query_BHTD, key_BHSD, value_BHSD, out_BHTD, lse_BHT, mask)
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_, mask = ctx.saved_tensors
        rows, heads, tokens, head_dim = query.shape
        grad_query, grad_key, grad_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        padded = _rounded(tokens, 128) if ctx.flash else tokens
        held = [
            query.new_empty(rows, heads, padded, dtype=torch.float32),
            query.new_empty(rows, padded, heads, _rounded(head_dim, 32), dtype=torch.float32),
        ]
        if key.shape[1] != heads:
            held += [tensor.new_empty(rows, tensor.shape[2], heads, head_dim) for tensor in (key, value)]
        grad_mask = torch.empty_like(mask) if mask is not None and ctx.needs_input_grad[3] else None
        del held
        return grad_query, grad_key, grad_value, grad_mask, None


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit
