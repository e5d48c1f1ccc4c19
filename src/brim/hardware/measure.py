"""What this machine achieves: matrix products by format, and copying. Measured once and kept.

A maker's peak says little about a small core count, a busy host or a format without hardware support (BF16 on most
processors runs slower than FP32). So the rates are timed, on shapes of a training step, in about a second in all, and
kept per processor, thread count and version of torch.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from brim.errors import UnknownNameError, did_you_mean
from brim.hardware.calibrate import operator_rates
from brim.hardware.detect import detect_host, is_busy
from brim.hardware.device import Device, MatmulFormat
from brim.hardware.rates import Rates, cpu_device, cpu_identity, keep_rates, kept_rates

_DTYPES: dict[MatmulFormat, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ROWS, _INNER, _COLUMNS = 512, 768, 2048
"""Tokens x hidden x feed-forward of a small model's step; an accelerator gets each side four times."""
_COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
_SECONDS = 0.2
"""Spent on each rate."""


def resolve_device(name: str, memory_bytes: int | None = None) -> Device:
    """The device of this name, with its measured rates; `memory_bytes` caps its memory.

    Names: `cpu`, `cuda` (the first GPU that torch sees). Raises UnknownNameError for another, and for `cuda` where
    torch sees none.
    """
    known = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if name not in known:
        raise UnknownNameError(
            f"unknown device {name!r}{did_you_mean(name, known)}; devices of this machine: {', '.join(known)}"
        )
    device = _cuda() if name == "cuda" else _cpu()
    return device.capped(memory_bytes)


def measured_rates(kind: str, identity: str, *, cache: Path | None = None) -> Rates:
    """Rates of the machine's `kind` of device, from the cache file or measured now. `identity` is the cache key.

    What is measured while others use the processors is returned and not kept: a rate nine times too low stayed
    in the file before.
    """
    if (rates := kept_rates(identity, cache=cache)) is None:
        busy = is_busy()
        rates = measure(kind)
        if not busy:
            keep_rates(identity, rates, cache=cache)
    return rates


def calibrate(*, cache: Path | None = None) -> tuple[Rates, bool]:
    """Rates of this machine's processor with those of a step's operators, measured anew, and whether they were kept.

    They are not where others use the processors meanwhile.
    """
    host = detect_host()
    busy = is_busy()
    rates = replace(measure("cpu"), operators=operator_rates())
    if not busy:
        keep_rates(cpu_identity(host), rates, cache=cache)
    return rates, not busy


def measure(kind: str) -> Rates:
    """Times matrix products and copies on this machine, for about a second in all."""
    scale = 4 if kind == "cuda" else 1
    flops = {name: _matmul_flops(kind, dtype, scale) for name, dtype in _DTYPES.items()}
    return Rates(flops=flops, bandwidth_bytes_per_s=_copy_bandwidth(kind))


def _cpu() -> Device:
    host = detect_host()
    return cpu_device(host, measured_rates("cpu", cpu_identity(host)))


def _cuda() -> Device:
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    rates = measured_rates("cuda", f"{name}, torch {torch.__version__}")
    return Device(
        name=name,
        kind="cuda",
        memory_bytes=total,
        memory_free_bytes=free,
        flops=rates.flops,
        bandwidth_bytes_per_s=rates.bandwidth_bytes_per_s,
        cores=0,
        vendor="AMD" if torch.version.hip else "NVIDIA",
        compute_capability=".".join(map(str, torch.cuda.get_device_capability())),
    )


def _matmul_flops(kind: str, dtype: torch.dtype, scale: int) -> float:
    """2 x rows x inner x columns operations over the best time of one product."""
    rows, inner, columns = (scale * side for side in (_ROWS, _INNER, _COLUMNS))
    left = torch.randn(rows, inner, device=kind).to(dtype)
    right = torch.randn(inner, columns, device=kind).to(dtype)
    out = torch.empty(rows, columns, device=kind, dtype=dtype)
    return 2 * rows * inner * columns / _best_seconds(kind, lambda: torch.mm(left, right, out=out))


def _copy_bandwidth(kind: str) -> float:
    """Bytes read and written over the best time of one copy, larger than the caches."""
    source = torch.ones(_COPY_BYTES[kind] // 4, device=kind)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES[kind] / _best_seconds(kind, lambda: target.copy_(source))


def _best_seconds(kind: str, work: Callable[[], Any]) -> float:
    """The shortest of as many runs as `_SECONDS` allows, one at the least, after one that warms up."""
    best = float("inf")
    _timed(kind, work)
    end = time.perf_counter() + _SECONDS
    while True:
        best = min(best, _timed(kind, work))
        if time.perf_counter() >= end:
            return best


def _timed(kind: str, work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if kind == "cuda":
        torch.cuda.synchronize()
    return max(time.perf_counter() - start, 1e-9)
