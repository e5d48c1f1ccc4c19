"""What a device was measured to achieve, and the file that keeps it. No torch."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from brim.cache import cache_directory
from brim.errors import UnknownNameError, did_you_mean
from brim.hardware.detect import Host, detect_host
from brim.hardware.device import MATMUL_FORMATS, Device, MatmulFormat
from brim.hardware.operator_rates import OperatorRates
from brim.publish import write_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Achieved by matrix products and by copying."""

    flops: Mapping[MatmulFormat, float]
    bandwidth_bytes_per_s: float
    operators: OperatorRates | None = None
    """Of a step's operators; None where nobody calibrated (`brim doctor --calibrate`)."""


def quick_device(name: str, memory_bytes: int | None = None) -> Device:
    """This machine's processor with the rates that were kept, else with `typical_rates`; nothing is measured.

    `memory_bytes` caps its memory. Raises UnknownNameError for a GPU: seeing one takes torch.
    """
    if name != "cpu":
        raise UnknownNameError(
            f"unknown device {name!r}{did_you_mean(name, ['cpu'])}; without torch (--quick) only cpu is known"
        )
    host = detect_host()
    return cpu_device(host, kept_rates(cpu_identity(host)) or typical_rates(host)).capped(memory_bytes)


def cpu_device(host: Host, rates: Rates) -> Device:
    return Device(
        name="cpu",
        kind="cpu",
        memory_bytes=host.memory_bytes,
        memory_free_bytes=host.memory_free_bytes,
        flops=rates.flops,
        bandwidth_bytes_per_s=rates.bandwidth_bytes_per_s,
        cores=host.cores,
        operators=rates.operators,
        identity=cpu_identity(host),
    )


def cpu_identity(host: Host) -> str:
    """What decides a processor's rates: the processor, how many threads work, and the library that works."""
    threads = os.environ.get("OMP_NUM_THREADS") or host.cores
    return f"{host.processor}, {threads} threads, torch {version('torch').partition('+')[0]}"


def typical_rates(host: Host) -> Rates:
    """Of a processor that nobody has measured: FP32 at half of an AVX2 core's 96 GFLOP/s (2 units x 8 lanes x 2 x
    3 GHz), BF16 no faster, and the bandwidth of one channel of DDR4-3200 (25.6 GB/s, JESD79-4). Right within a factor
    of about three; `brim predict` without `--quick` measures."""
    return Rates(flops=dict.fromkeys(MATMUL_FORMATS, 48e9 * host.cores), bandwidth_bytes_per_s=25.6e9)


def kept_rates(identity: str, *, cache: Path | None = None) -> Rates | None:
    """What was measured before; None where it was not, or the file is absent or damaged."""
    return _rates_from(_rows(cache or cache_path()).get(identity))


def keep_rates(identity: str, rates: Rates, *, cache: Path | None = None) -> None:
    """Add a row to the file. A file that cannot be written costs a second next time, no more."""
    path = cache or cache_path()
    row: dict[str, Any] = {"flops": dict(rates.flops), "bandwidth": rates.bandwidth_bytes_per_s}
    if rates.operators is not None:
        row["operators"] = rates.operators.to_dict()
    try:
        write_whole(path, json.dumps({**_rows(path), identity: row}, indent=1))
    except OSError:
        return


def cache_path() -> Path:
    """`$XDG_CACHE_HOME/brim/rates.json`."""
    return cache_directory() / "rates.json"


def _rows(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _rates_from(row: Any) -> Rates | None:
    """Rates in a row of the file; None where any of them is missing or not a positive number."""
    if not isinstance(row, dict) or not isinstance(row.get("flops"), dict):
        return None
    numbers = [row.get("bandwidth"), *(row["flops"].get(name) for name in MATMUL_FORMATS)]
    if not all(isinstance(number, int | float) and 0 < number < float("inf") for number in numbers):
        return None
    return Rates(
        flops={name: float(row["flops"][name]) for name in MATMUL_FORMATS},
        bandwidth_bytes_per_s=float(row["bandwidth"]),
        operators=OperatorRates.from_dict(row.get("operators")),
    )
