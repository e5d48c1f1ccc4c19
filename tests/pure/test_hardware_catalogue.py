"""Accelerators by name: spelling, refusals, and rows that contradict nobody."""

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
