"""Rates are measured once, kept, and measured again when the file cannot be trusted."""

import json
import time
from pathlib import Path

import pytest
import torch

from brim.errors import UnknownNameError
from brim.hardware import measure as measuring
from brim.hardware.measure import measured_rates, resolve_device
from brim.hardware.rates import Rates
from brim.units import GIB

KNOWN = Rates(flops={"fp32": 1e9, "bf16": 2e9, "fp16": 3e9}, bandwidth_bytes_per_s=3e9)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of `measure`, which answers at once."""
    calls: list[str] = []

    def quickly(kind: str) -> Rates:
        calls.append(kind)
        return KNOWN

    monkeypatch.setattr(measuring, "measure", quickly)
    monkeypatch.setattr(measuring, "is_busy", lambda: False)
    return calls


def test_measured_rates_are_of_this_machine() -> None:
    """A product timed by hand is not much faster than the measured best, and measuring takes no minute."""
    start = time.perf_counter()
    rates = measuring.measure("cpu")
    assert time.perf_counter() - start < 5
    left, right = torch.randn(512, 768), torch.randn(768, 2048)
    start = time.perf_counter()
    _ = left @ right
    by_hand = 2 * 512 * 768 * 2048 / (time.perf_counter() - start)
    assert 0 < by_hand < 20 * rates.flops["fp32"]
    assert rates.flops["bf16"] > 0
    assert 1e8 < rates.bandwidth_bytes_per_s < 1e13


def test_rates_are_measured_once_per_identity(tmp_path: Path, counted: list[str]) -> None:
    """The second question is answered from the file; another processor's is not."""
    cache = tmp_path / "brim" / "rates.json"
    assert measured_rates("cpu", "a", cache=cache) == measured_rates("cpu", "a", cache=cache) == KNOWN
    assert counted == ["cpu"]
    measured_rates("cpu", "b", cache=cache)
    assert counted == ["cpu", "cpu"]
    assert set(json.loads(cache.read_text())) == {"a", "b"}
    assert [path.name for path in cache.parent.iterdir()] == ["rates.json"]


def test_a_busy_machines_rates_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]
) -> None:
    """What is measured while others use the processors is used once and measured again next time."""
    monkeypatch.setattr(measuring, "is_busy", lambda: True)
    for _ in range(2):
        assert measured_rates("cpu", "a", cache=tmp_path / "rates.json") == KNOWN
    assert counted == ["cpu", "cpu"]
    assert not (tmp_path / "rates.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '{"a": 5}',
        '{"a": {"flops": {"fp32": 1}, "bandwidth": 1}}',
        '{"a": {"flops": {"fp32": 0, "bf16": 1, "fp16": 1}, "bandwidth": 1}}',
        '{"a": {"flops": {"fp32": 1, "bf16": 1, "fp16": 1}, "bandwidth": "fast"}}',
    ],
)
def test_a_damaged_file_is_measured_again_and_mended(tmp_path: Path, counted: list[str], damage: str) -> None:
    """Whatever is wrong with the file, the rates are measured, and the next question finds them."""
    cache = tmp_path / "rates.json"
    cache.write_text(damage)
    assert measured_rates("cpu", "a", cache=cache) == KNOWN
    assert measured_rates("cpu", "a", cache=cache) == KNOWN
    assert counted == ["cpu"]


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, counted: list[str]) -> None:
    """With a file where the folder should be, the rates are measured each time."""
    (tmp_path / "brim").write_text("not a folder")
    for _ in range(2):
        assert measured_rates("cpu", "a", cache=tmp_path / "brim" / "rates.json") == KNOWN
    assert counted == ["cpu", "cpu"]


def test_resolve_device_caps_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]) -> None:
    """`cpu` is this machine within the cap; its rates go to the user's cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = resolve_device("cpu", GIB)
    assert (device.kind, device.memory_bytes) == ("cpu", GIB)
    assert 0 < device.memory_free_bytes <= GIB
    assert device.flops == KNOWN.flops
    assert (tmp_path / "brim" / "rates.json").exists()


def test_an_unknown_device_is_named_with_the_known(counted: list[str]) -> None:
    """A misspelt device is an error that names what this machine has."""
    with pytest.raises(UnknownNameError, match=r"'cpo'; did you mean cpu\?; devices of this machine: cpu"):
        resolve_device("cpo")
    assert counted == []
