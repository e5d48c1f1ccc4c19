"""Accelerators by name: facts shipped with the package (data/SOURCE.md says from where) and a user's own rows, and
`find` -> `Device`.

A maker's FLOP/s are a peak that no matrix product reaches. Where somebody published a measured BF16 product it is
taken; elsewhere the peak times the middle share that the same maker's measured devices reach.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import median

from brim.errors import UnknownNameError, UsageError, nearest
from brim.hardware.device import Device
from brim.hardware.own_rows import own_rows, own_rows_path
from brim.units import GIB

MODELLED_VENDORS = ("NVIDIA", "AMD")
"""Whose devices run PyTorch's CUDA caching allocator (AMD's through ROCm)."""

_FORMATS = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4")
_FORGOTTEN = re.compile(r"nvidia|geforce|tesla|instinct|amd|[^a-z0-9]")
"""What people leave out or spell differently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One row: what is known of a device."""

    name: str
    aliases: tuple[str, ...]
    vendor: str
    kind: str
    """datacenter, workstation, consumer, tpu or apple."""
    year: int
    """0: not said."""
    memory_bytes: int
    """What a program may use, where somebody printed it; else what is soldered on."""
    peak_flops: Mapping[str, float]
    """Dense, as the maker says, by format; a format without a figure is absent."""
    measured_bf16_flops: float | None
    """Best matrix product that somebody published."""
    bandwidth_bytes_per_s: float
    compute_capability: str
    """`8.0`; AMD's own names (`gfx942`); empty elsewhere."""
    link: str
    link_bytes_per_s: float | None
    """One direction, to the other devices of its node."""
    devices_per_node: int
    context_bytes: int | None
    """CUDA context, where measured on this device."""
    power_w: float | None
    """What its maker lets the board draw."""
    price_usd_per_hour: float | None
    """Rented, as seen once; `notes` say where and when."""
    source: str
    notes: str


def accelerators() -> Mapping[str, Accelerator]:
    """All rows by name: the shipped ones in the order of the data, then the user's own, which replace equal names."""
    return _all_rows(own_rows_path())


def lookup(name: str) -> Accelerator | None:
    """The row of this name or alias, in any case, with or without maker, spaces and hyphens; None for another."""
    return _by_spelling(own_rows_path()).get(_spelling(name))


def accelerator(name: str) -> Accelerator:
    """As `lookup`. Raises UnknownNameError with the nearest names."""
    row = lookup(name)
    if row is None:
        known = [alias for accelerator in accelerators().values() for alias in accelerator.aliases]
        near = nearest(name, known, count=4) or ["a100", "h100", "rtx-4090"]
        raise UnknownNameError(
            f"unknown GPU {name!r}; did you mean {', '.join(near)}? A row of your own goes into {own_rows_path()}"
        )
    return row


def find(name: str) -> Device:
    """The device of this name.

    Raises UnknownNameError with the nearest names; UsageError for a device whose memory is not modelled.
    """
    row = accelerator(name)
    if row.vendor not in MODELLED_VENDORS:
        raise UsageError(
            f"GPU {row.name}: its memory is not modelled (Brim knows the allocator of CUDA and ROCm); "
            f"choose a device of {' or '.join(MODELLED_VENDORS)}"
        )
    return _device(row)


def _device(row: Accelerator) -> Device:
    peak = row.peak_flops
    fp32 = peak["fp32"] * _share(row.vendor)
    bf16 = row.measured_bf16_flops or (peak["bf16"] * _share(row.vendor) if "bf16" in peak else fp32)
    fp16 = row.measured_bf16_flops or (peak["fp16"] * _share(row.vendor) if "fp16" in peak else bf16)
    return Device(
        name=row.name,
        kind="cuda",
        memory_bytes=row.memory_bytes,
        memory_free_bytes=row.memory_bytes,
        flops={"fp32": fp32, "bf16": bf16, "fp16": fp16},
        bandwidth_bytes_per_s=row.bandwidth_bytes_per_s,
        cores=0,
        vendor=row.vendor,
        compute_capability=row.compute_capability,
        context_bytes=row.context_bytes,
        lacks=frozenset(name for name in ("bf16", "fp16") if name not in peak),
        link_bytes_per_s=row.link_bytes_per_s or 0.0,
    )


@cache
def _share(vendor: str) -> float:
    """Of the maker's BF16 peak that this maker's measured devices reach, in the middle."""
    rows = [row for row in _shipped().values() if row.vendor == vendor and row.measured_bf16_flops]
    return median((row.measured_bf16_flops or 0) / row.peak_flops["bf16"] for row in rows)


@cache
def _shipped() -> Mapping[str, Accelerator]:
    text = resources.files("brim.hardware").joinpath("data", "accelerators.csv").read_text(encoding="utf-8")
    return {row["name"]: _accelerator(row) for row in csv.DictReader(text.splitlines())}


@cache
def _all_rows(path: Path) -> Mapping[str, Accelerator]:
    own = (_accelerator(defaultdict(str, row)) for row in own_rows(path))
    return {**_shipped(), **{row.name: row for row in own}}


@cache
def _by_spelling(path: Path) -> Mapping[str, Accelerator]:
    return {_spelling(word): row for row in _all_rows(path).values() for word in (row.name, *row.aliases)}


def _spelling(name: str) -> str:
    return _FORGOTTEN.sub("", name.casefold())


def _accelerator(row: Mapping[str, str]) -> Accelerator:
    peaks = {name: row[_column(name)] for name in _FORMATS}
    return Accelerator(
        name=row["name"],
        aliases=tuple(filter(None, row["aliases"].split(";"))),
        vendor=row["vendor"],
        kind=row["kind"],
        year=int(row["year"] or 0),
        memory_bytes=int(float(row["usable_memory_gib"] or row["memory_gib"]) * GIB),
        peak_flops={name: 1e12 * float(text) for name, text in peaks.items() if text},
        measured_bf16_flops=_number(row["measured_bf16_matmul_tflops"], 1e12),
        bandwidth_bytes_per_s=1e9 * float(row["memory_bandwidth_gb_s"]),
        compute_capability=row["compute_capability"],
        link=row["link"],
        link_bytes_per_s=_number(row["link_bandwidth_gb_s"], 1e9),
        devices_per_node=int(row["gpus_per_node_typical"] or 1),
        context_bytes=int(float(row["cuda_context_mib"]) * 2**20) if row["cuda_context_mib"] else None,
        power_w=_number(row["tdp_w"], 1),
        price_usd_per_hour=_number(row["price_usd_per_hour"], 1),
        source=row["source"],
        notes=row["notes"],
    )


def _column(name: str) -> str:
    return {"fp32": "fp32_tflops", "int8": "int8_dense_tops"}.get(name, f"{name}_dense_tflops")


def _number(text: str, unit: float) -> float | None:
    return unit * float(text) if text else None
