"""This machine's processor and memory, container limits included. No torch.

A container's limit is not in /proc/meminfo: control groups say it, in version 2 or 1, and a process may be in a
nested group whose ancestors have limits of their own.
"""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import psutil

_ROOT = Path("/")
_NO_LIMIT = 2**60
"""Version 1 writes "no limit" as a number near 2^63."""

_BUSY_SECONDS, _BUSY_PERCENT = 0.1, 25.0
"""Above this share of all processors' time in a tenth of a second, the machine is busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Processor and memory that this process may use."""

    processor: str
    cores: int
    memory_bytes: int
    memory_free_bytes: int
    """Now, without swapping: what the kernel calls available, and what is left of the container's limit."""


def detect_host(root: Path = _ROOT) -> Host:
    """This machine, as far as this process may use it. `root` is where /proc and /sys are (tests give another)."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in cgroup_memory(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return Host(processor=processor_name(root), cores=usable_cores(root), memory_bytes=total, memory_free_bytes=free)


def processor_name(root: Path = _ROOT) -> str:
    """`AMD EPYC 7763 64-Core Processor`; the architecture where the system does not say."""
    text = _read(root / "proc/cpuinfo") or ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model") and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine() or "cpu"


def usable_cores(root: Path = _ROOT) -> int:
    """Cores of this process's affinity, or of the container's quota where that is less; at least 1."""
    # os.sched_getaffinity is not on macOS and Windows
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(ceil(quota) for quota in cgroup_cores(root))]))


def is_busy() -> bool:
    """Whether others use this machine's processors now: what is timed then is not what it achieves."""
    return psutil.cpu_percent(interval=_BUSY_SECONDS) > _BUSY_PERCENT


def cgroup_memory(root: Path = _ROOT) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of each control group around this process that has a limit.

    Page cache that can be dropped is not counted as used.
    """
    for folder in _groups(root, "memory"):
        for limit_name, used_name, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _number(folder / limit_name)
            if limit is not None and limit < _NO_LIMIT:
                used = (_number(folder / used_name) or 0) - _statistic(folder / "memory.stat", cache_key)
                yield limit, max(0, used)


def cgroup_cores(root: Path = _ROOT) -> Iterator[float]:
    """Cores' worth of time that each control group around this process may spend."""
    for folder in _groups(root, "cpu"):
        quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
        if quota.strip().isdigit() and period.strip().isdigit() and int(period):
            yield int(quota) / int(period)
        old_quota, old_period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if old_quota and old_period and old_quota > 0:
            yield old_quota / old_period


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups, innermost first, in both versions' layouts."""
    mount = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        if parts[1] and controller not in parts[1].split(","):
            continue
        top = mount / controller if parts[1] else mount
        inner = top / parts[2].lstrip("/")
        # inside a container the path may be the host's: then the mount itself is our group
        while inner != top:
            if inner.is_dir():
                yield inner
            inner = inner.parent
        if top.is_dir():
            yield top


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _statistic(path: Path, key: str) -> int:
    for line in (_read(path) or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.strip().isdigit():
            return int(value)
    return 0
