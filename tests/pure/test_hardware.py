"""This machine as a process may use it: container limits, odd files, caps."""

from pathlib import Path

import psutil
import pytest

from brim.errors import UnknownNameError
from brim.hardware import Device
from brim.hardware.detect import cgroup_memory, detect_host, processor_name, usable_cores
from brim.hardware.rates import Rates, cpu_identity, keep_rates, quick_device, typical_rates
from brim.units import GIB


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def device() -> Device:
    return Device(
        name="cpu",
        kind="cpu",
        memory_bytes=8 * GIB,
        memory_free_bytes=6 * GIB,
        flops={"fp32": 1e11, "bf16": 1e11, "fp16": 1e11},
        bandwidth_bytes_per_s=1e10,
        cores=4,
    )


def test_without_a_container_the_host_is_what_psutil_says(tmp_path: Path) -> None:
    """Without control groups, total memory is psutil's and free is not above it."""
    host = detect_host(tmp_path)
    assert host.memory_bytes == psutil.virtual_memory().total
    assert 0 < host.memory_free_bytes <= host.memory_bytes
    assert host.cores >= 1
    assert host.processor


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/job\n",
            "sys/fs/cgroup/job/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/job/memory.current": f"{GIB // 2}\n",
            "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB // 4}\n",
        },
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/job\n3:memory:/job\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{GIB // 2}\n",
            "sys/fs/cgroup/memory/job/memory.stat": f"total_inactive_file {GIB // 4}\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_a_containers_limit_caps_total_and_free(tmp_path: Path, files: dict[str, str]) -> None:
    """A control group's limit is the total, and what is left of it is free; droppable cache counts as free."""
    host = detect_host(write(tmp_path, files))
    assert host.memory_bytes == GIB
    assert host.memory_free_bytes == GIB - (GIB // 2 - GIB // 4)


def test_an_outer_groups_lower_limit_counts(tmp_path: Path) -> None:
    """The lowest limit around the process decides, not the innermost."""
    files = {
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/fs/cgroup/outer/inner/memory.max": f"{2 * GIB}\n",
        "sys/fs/cgroup/outer/memory.max": f"{GIB}\n",
    }
    assert detect_host(write(tmp_path, files)).memory_bytes == GIB


@pytest.mark.parametrize("text", ["max\n", "", "rubbish\n", f"{2**63 - 4096}\n"])
def test_no_limit_is_no_limit(tmp_path: Path, text: str) -> None:
    """`max`, version 1's enormous number and unreadable files set no limit."""
    name = "memory.limit_in_bytes" if text.strip().isdigit() else "memory.max"
    write(tmp_path, {"proc/self/cgroup": "0::/\n", f"sys/fs/cgroup/{name}": text})
    assert list(cgroup_memory(tmp_path)) == []


def test_a_time_quota_limits_cores(tmp_path: Path) -> None:
    """Half a core's worth of time is one core; the affinity is the most there is."""
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"})
    assert usable_cores(tmp_path) == 1
    write(tmp_path, {"sys/fs/cgroup/cpu.max": "max 100000\n"})
    assert usable_cores(tmp_path) == usable_cores(tmp_path / "nothing")


def test_processor_name_is_read_or_guessed(tmp_path: Path) -> None:
    """The model name of /proc/cpuinfo, with its spaces put in order."""
    write(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Acme  9000   8-Core\n"})
    assert processor_name(tmp_path) == "Acme 9000 8-Core"
    assert processor_name(tmp_path / "nothing")


def test_a_cap_lowers_memory_and_never_raises_it(device: Device) -> None:
    """Free never exceeds total, and a cap above the machine's memory is the machine's memory."""
    assert device.capped(None) == device
    low, high = device.capped(2 * GIB), device.capped(64 * GIB)
    assert (low.memory_bytes, low.memory_free_bytes) == (2 * GIB, 2 * GIB)
    assert (high.memory_bytes, high.memory_free_bytes) == (8 * GIB, 6 * GIB)


def test_rates_that_were_kept_are_found_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--quick` answers with the measured rates of this processor where there are some, else with typical ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    host = detect_host()
    assert quick_device("cpu").flops == typical_rates(host).flops
    measured = Rates(flops={"fp32": 1e9, "bf16": 2e9, "fp16": 3e9}, bandwidth_bytes_per_s=3e9)
    keep_rates(cpu_identity(host), measured)
    assert quick_device("cpu", GIB).flops == measured.flops
    assert quick_device("cpu", GIB).memory_bytes == GIB


def test_quick_knows_no_gpu() -> None:
    """Seeing a GPU takes torch, so without it only `cpu` has a name."""
    with pytest.raises(UnknownNameError, match=r"unknown device 'cuda'.*only cpu"):
        quick_device("cuda")
