"""What this machine is: devices with the memory that is free now, limits, disk, libraries, and what was measured."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from brim.hardware.catalogue import lookup
from brim.hardware.detect import cgroup_memory, detect_host, is_busy
from brim.hardware.rates import Rates, cpu_identity, kept_rates

NEEDED = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "gguf",
    "numpy",
)
OPTIONAL = {
    "bitsandbytes": "pip install bitsandbytes",
    "compressed-tensors": "pip install 'brim[int8]'",
    "datasets": "pip install 'brim[hub-data]'",
    "matplotlib": "pip install 'brim[plot]'",
}
"""Packages that some recipes or options need -> the command that installs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundDevice:
    kind: Literal["cpu", "cuda", "rocm", "apple"]
    name: str
    memory_bytes: int
    """What a program may use: under a container's limit, that."""
    memory_free_bytes: int | None
    """Now; None where the system does not say."""
    detail: str
    """Cores, or compute capability and the catalogue's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    purpose: str
    path: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    system: str
    python: str
    busy: bool
    """Others use the processors now: what is timed says little."""
    devices: tuple[FoundDevice, ...]
    no_gpu_because: str
    """Empty where there is a GPU."""
    memory_limits_bytes: tuple[int, ...]
    """Of control groups around this process."""
    disks: tuple[Disk, ...]
    libraries: dict[str, str | None]
    """Name -> version; None: not installed."""
    rates: dict[str, Any] | None
    """Of the processor, as kept; None: never measured."""
    calibrated: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_up() -> Checkup:
    """Looks and measures nothing."""
    host = detect_host()
    kept = kept_rates(cpu_identity(host))
    gpus = _gpus()
    processor = FoundDevice(
        kind="cpu",
        name=host.processor,
        memory_bytes=host.memory_bytes,
        memory_free_bytes=host.memory_free_bytes,
        detail=f"{host.cores} cores, {torch.get_num_threads()} threads",
    )
    return Checkup(
        system=platform.platform(),
        python=platform.python_version(),
        busy=is_busy(),
        devices=(processor, *gpus),
        no_gpu_because="" if gpus else _no_gpu_because(),
        memory_limits_bytes=tuple(limit for limit, _ in cgroup_memory()),
        disks=tuple(_disks()),
        libraries={name: _version(name) for name in (*NEEDED, *OPTIONAL)},
        rates=None if kept is None else rates_to_dict(kept),
        calibrated=kept is not None and kept.operators is not None,
    )


def rates_to_dict(rates: Rates) -> dict[str, Any]:
    operators = None if rates.operators is None else rates.operators.to_dict()
    return {
        "flops": dict(rates.flops),
        "bandwidth_bytes_per_s": rates.bandwidth_bytes_per_s,
        "operators": operators,
    }


def _gpus() -> list[FoundDevice]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        row = lookup(name)
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        found.append(
            FoundDevice(
                kind="rocm" if torch.version.hip else "cuda",
                name=name,
                memory_bytes=total,
                memory_free_bytes=free,
                detail=f"{capability}, {row.name if row else 'not in the catalogue'}",
            )
        )
    if torch.backends.mps.is_available():
        limit = torch.mps.recommended_max_memory()
        free = limit - torch.mps.driver_allocated_memory()
        found.append(
            FoundDevice(
                kind="apple",
                name=platform.processor() or platform.machine(),
                memory_bytes=limit,
                memory_free_bytes=free,
                detail="memory shared with the processor; not trained on by this version",
            )
        )
    return found


def _no_gpu_because() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build for processors alone"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return f"torch {torch.__version__} is built for {built}, and sees no device or no driver"


def _disks() -> list[Disk]:
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    places = {"working directory": Path.cwd(), "models (HF_HOME)": hub, "temporary": Path(tempfile.gettempdir())}
    found = []
    for purpose, path in places.items():
        usage = shutil.disk_usage(_existing(path))
        found.append(Disk(purpose=purpose, path=str(path), free_bytes=usage.free, total_bytes=usage.total))
    return found


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
