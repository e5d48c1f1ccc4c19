"""Times the operators of a training step on this machine: the rates of `operator_rates`, some seconds in all."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from brim.hardware.operator_rates import (
    ATTENTIONS,
    FORMATS,
    LENGTHS,
    PASSES,
    PRODUCTS,
    SIZES,
    Format,
    OperatorRates,
    Pass,
    Product,
    key,
)

Clock = Callable[[], float]

DTYPES: dict[Format, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SHAPES = {
    # tokens x hidden x feed-forward of a small model; its vocabulary; a short batch; adapters of rank 16
    "square": (512, 768, 2048),
    "turned": (2048, 512, 768),
    "wide": (512, 768, 32768),
    "few": (64, 768, 2048),
    "thin": (512, 16, 768),
    "narrow": (512, 768, 16),
}
_ROWS, _HEADS, _WIDTH = 2, 8, 64
"""Of attention: rows, heads, width of a head."""
_OPERAND_BYTES = 2**25
"""Of operands that a product is timed with, in turn."""
NUM_CHAINED = 20 + 2 + 20 * 2 + 20
"""Operators of `_chain`: products, sum and its ones and expansion, two products of backward and their sum."""
_HELD_BYTES = 2**27
"""More than an allocator keeps for itself when it is freed."""
_LARGEST_KEPT = 2**25 - 2**16
"""Bytes under glibc's largest threshold, 32 MiB."""
_TINY = 16
"""Elements: what such an operator takes is its dispatch."""


def operator_rates(*, seconds_each: float = 0.03, clock: Clock = time.perf_counter) -> OperatorRates:
    """Rates of this machine's processor, each from the middle of the runs that `seconds_each` allows.

    `clock` may count processor time: on a busy machine, with one thread, that is what the step would take alone.
    """
    timed = partial(_seconds, seconds=seconds_each, clock=clock)
    rates: dict[str, float] = {}
    # glibc maps blocks anew until it has seen larger ones freed (mallopt, M_MMAP_THRESHOLD), as a step does at once
    torch.ones(_LARGEST_KEPT // 4)
    for number_format in FORMATS:
        dtype = DTYPES[number_format]
        for product in PRODUCTS:
            work, flops = _product(product, dtype)
            rates[key(product, number_format)] = flops / timed(work)
        for tokens in LENGTHS:
            forward, backward = _attention(tokens, dtype)
            for direction, work, products in zip(ATTENTIONS, (forward, backward), (2, 5), strict=True):
                flops = products * 2 * _ROWS * _HEADS * tokens * tokens * _WIDTH
                rates[key(direction, number_format, tokens)] = flops / timed(work)
        for kind in PASSES:
            for size in SIZES:
                work, nbytes = _pass(kind, size, dtype)
                rates[key(kind, number_format, size)] = nbytes / timed(work)
    return OperatorRates(rates=rates, overhead_s=timed(_chain) / NUM_CHAINED)


def _product(product: Product, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """A linear's product, once with each of several operands: a step comes back to one when it has left the cache."""
    rows, inner, columns = _SHAPES[product]
    count = max(2, _OPERAND_BYTES // (inner * columns * dtype.itemsize)) if inner * columns > 2**16 else 2
    out = torch.empty(rows, columns, dtype=dtype)
    if product == "turned":
        pairs = [(_random(inner, rows, dtype).t(), _random(inner, columns, dtype)) for _ in range(count)]
    else:
        left = _random(rows, inner, dtype)
        pairs = [(left, _random(columns, inner, dtype).t()) for _ in range(count)]  # weights lie transposed

    def work() -> None:
        for left, right in pairs:
            torch.mm(left, right, out=out)

    return work, count * 2 * rows * inner * columns


def _random(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, columns).to(dtype)


def _chain() -> None:
    """A chain of NUM_CHAINED operators on almost nothing, forward and backward, called from Python as a model is."""
    start = torch.ones(_TINY, requires_grad=True)
    tensor = start
    for _ in range(20):
        tensor = tensor * start
    tensor.sum().backward()


def _pass(kind: Pass, size: int, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """The operator that stands for its kind, and the bytes it moves."""
    count = size // dtype.itemsize
    if kind == "fresh":
        # held together as a step's activations are: memory that is freed at once would come back already touched
        held = max(1, _HELD_BYTES // size)
        return lambda: [torch.ones(count, dtype=dtype) for _ in range(held)], held * size
    left, right = torch.ones(count // 512, 512, dtype=dtype), torch.ones(count // 512, 512, dtype=dtype)
    match kind:
        case "in-place":
            return lambda: left.add_(right, alpha=1e-9), 3 * size
        case "function":
            return lambda: torch.ops.aten.silu.out(left, out=right), 2 * size
        case "reduce":
            return lambda: left.sum(-1), size


def _attention(tokens: int, dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
    # B rows, T tokens, H heads, D width of a head; laid out as projections leave them
    query, keys, value = (torch.randn(_ROWS, tokens, _HEADS, _WIDTH).to(dtype).transpose(1, 2) for _ in range(3))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, log_sums = attend(query, keys, value, 0.0, True)
    grad = torch.ones_like(out)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return (
        lambda: attend(query, keys, value, 0.0, True),
        lambda: backward(grad, query, keys, value, out, log_sums, 0.0, True),
    )


def _seconds(work: Callable[[], Any], *, seconds: float, clock: Clock) -> float:
    """Of one run: the middle of as many as fit, three at the least, after one that warms up."""
    work()
    runs: list[float] = []
    begin = clock()
    while len(runs) < 3 or clock() - begin < seconds:
        start = clock()
        work()
        runs.append(clock() - start)
    return max(median(runs), 1e-9)
