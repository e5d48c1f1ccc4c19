"""A user's own accelerators: one TOML file with the columns of data/accelerators.csv as keys.

[[accelerator]]
name = "Lab card 48GB"
aliases = ["lab-card"]
vendor = "NVIDIA"
memory_gib = 48
memory_bandwidth_gb_s = 864
fp32_tflops = 91.6
bf16_dense_tflops = 181
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brim.errors import UsageError, did_you_mean

_TEXTS = ("name", "vendor", "kind", "compute_capability", "link", "source", "notes")
_NUMBERS = (
    "year", "memory_gib", "usable_memory_gib", "memory_bandwidth_gb_s", "fp32_tflops", "tf32_dense_tflops",
    "fp16_dense_tflops", "bf16_dense_tflops", "fp8_dense_tflops", "int8_dense_tops", "fp4_dense_tflops",
    "link_bandwidth_gb_s", "gpus_per_node_typical", "tdp_w", "measured_bf16_matmul_tflops", "cuda_context_mib",
    "price_usd_per_hour",
)  # fmt: skip
_WHOLE = ("year", "gpus_per_node_typical")
_NEEDED = ("name", "vendor", "memory_gib", "memory_bandwidth_gb_s", "fp32_tflops")


def own_rows_path() -> Path:
    """`$BRIM_ACCELERATORS`, else `$XDG_CONFIG_HOME/brim/accelerators.toml`."""
    if named := os.environ.get("BRIM_ACCELERATORS"):
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "brim" / "accelerators.toml"


def own_rows(path: Path) -> list[Mapping[str, str]]:
    """The file's rows, as texts of the shipped file's columns; none where there is no file. Raises UsageError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"accelerators in {path} cannot be read: {error}") from None
    rows = values.pop("accelerator", [])
    if values or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: it holds tables [[accelerator]] and nothing else")
    return [_checked(row, f"{path}: accelerator {number}") for number, row in enumerate(rows, start=1)]


def _checked(row: Mapping[str, Any], where: str) -> Mapping[str, str]:
    known = (*_TEXTS, "aliases", *_NUMBERS)
    for key in row:
        if key not in known:
            raise UsageError(
                f"{where}: unknown key {key!r}{did_you_mean(key, known) or '; known: ' + ', '.join(known)}"
            )
    if missing := [key for key in _NEEDED if key not in row]:
        raise UsageError(f"{where}: {', '.join(missing)} must be said")
    return {"source": "user's own row", **{key: _text(key, value, where) for key, value in row.items()}}


def _text(key: str, value: Any, where: str) -> str:
    if key == "aliases":
        if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
            raise UsageError(f'{where}: aliases = {value!r} is not a list of names; write ["lab-card"]')
        return ";".join(value)
    if key in _TEXTS:
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"{where}: {key} = {value!r} is not a text in quotes")
        return value
    whole = key in _WHOLE
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value < 1e9:
        raise UsageError(f"{where}: {key} = {value!r} is not a {'whole ' if whole else ''}number above zero")
    return str(value)
