"""Accelerators by name: spelling, refusals, and rows that contradict nobody."""

from pathlib import Path

import pytest

from brim.errors import UnknownNameError, UsageError
from brim.hardware import accelerators, find
from brim.hardware.catalogue import MODELLED_VENDORS, _spelling
from brim.units import GIB


@pytest.mark.parametrize("name", ["a100", "A100", "A100-80GB", "NVIDIA A100-SXM4-80GB", "a100 sxm4 80gb"])
def test_a_name_may_be_spelt_as_people_do(name: str) -> None:
    """Case, maker, spaces and hyphens do not matter; the tool's own name and the driver's both work."""
    assert find(name).name == "A100 SXM4 80GB"


def test_no_spelling_means_two_devices() -> None:
    """Names and aliases, however spelt, are distinct over all rows."""
    seen: dict[str, str] = {}
    for row in accelerators().values():
        for spelling in {_spelling(word) for word in (row.name, *row.aliases)}:
            assert seen.setdefault(spelling, row.name) == row.name


def test_a_typo_is_answered_with_near_names() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown GPU 'h1000'.*h100"):
        find("h1000")


def test_a_device_without_a_caching_allocator_is_refused() -> None:
    """What the allocator's model does not describe is not predicted."""
    with pytest.raises(UsageError, match="not modelled"):
        find("tpu-v4")


@pytest.mark.parametrize("row", accelerators().values(), ids=lambda row: row.aliases[0])
def test_rows_are_plausible(row) -> None:  # type: ignore[no-untyped-def]
    """No device offers more memory than its name, nor reaches more than 1.2 of its maker's peak; each has a source.

    (GeForce peaks are stated for FP32 accumulation at half rate, and cards run above their base clock.)
    """
    assert 4 * GIB < row.memory_bytes <= 600 * GIB
    assert row.source
    if row.measured_bf16_flops:
        assert row.measured_bf16_flops <= 1.2 * row.peak_flops["bf16"]
    if row.vendor in MODELLED_VENDORS:
        device = find(row.aliases[0])
        assert (device.name, device.kind, device.memory_bytes) == (row.name, "cuda", row.memory_bytes)
        assert 0 < device.flops["fp32"] <= row.peak_flops["fp32"]
    if row.vendor == "NVIDIA":
        assert find(row.name).compute_major in (3, 6, 7, 8, 9, 10, 12)


OWN = """
[[accelerator]]
name = "Lab card 48GB"
aliases = ["lab-card"]
vendor = "NVIDIA"
memory_gib = 48
memory_bandwidth_gb_s = 864
fp32_tflops = 91.6
bf16_dense_tflops = 181
compute_capability = "8.9"
"""


def test_own_rows_are_found_as_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row in the user's file is a device by name and alias; the shipped ones stay."""
    path = tmp_path / "rows.toml"
    path.write_text(OWN)
    monkeypatch.setenv("BRIM_ACCELERATORS", str(path))
    device = find("LAB-card")
    assert (device.name, device.memory_bytes, device.compute_major) == ("Lab card 48GB", 48 * GIB, 8)
    assert find("a100").name == "A100 SXM4 80GB"
    monkeypatch.setenv("BRIM_ACCELERATORS", str(tmp_path / "absent.toml"))
    with pytest.raises(UnknownNameError, match=r"absent\.toml"):
        find("lab-card")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN.replace("memory_gib", "memory_gb"), r"unknown key 'memory_gb'; did you mean memory_gib"),
        (OWN.replace("memory_gib = 48", ""), "memory_gib must be said"),
        (OWN.replace("= 864", '= "fast"'), "memory_bandwidth_gb_s = 'fast' is not a number"),
        (OWN.replace("= 864", "= -1"), "above zero"),
        (OWN.replace('["lab-card"]', '"lab-card"'), "not a list of names"),
        ("[accelerator]\nname = 'x'", "tables"),
        ("name = 'x'", "nothing else"),
        ("accelerator = [", "cannot be read"),
    ],
)
def test_wrong_own_rows_are_refused(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to misspell the file is one message that names it."""
    path = tmp_path / "rows.toml"
    path.write_text(text)
    monkeypatch.setenv("BRIM_ACCELERATORS", str(path))
    with pytest.raises(UsageError, match=message):
        find("a100")
