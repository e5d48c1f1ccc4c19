"""How wrong predicted step times were: shipped errors for each way of telling them, and the user's own runs.

A band holds four of five such errors. Three runs of the user on the same device, told in the same way, replace the
shipped ones: nothing says more about a machine than the machine.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path

from brim.cache import cache_directory
from brim.hardware.device import Device

OPERATORS = "cpu-operators"
"""The rehearsal's operators at the rates of a calibrated processor."""
CPU_ROOFLINE = "cpu-roofline"
"""One peak and one bandwidth."""
GPU_OPERATORS = "gpu-operators"
"""The rehearsal's operators at published rates of products and the maker's bandwidth."""
GPU_ROOFLINE = "gpu-roofline"
FEWEST_RUNS = 3
"""Own runs that replace the shipped errors."""
_MOST_RUNS = 50
"""The latest, of one device and basis: older ones are of other days."""
_OUTSIDE = 0.1
"""Share of errors below the band, and above it."""


def roofline_basis(device: Device) -> str:
    return GPU_ROOFLINE if device.kind == "cuda" else CPU_ROOFLINE


def time_range(seconds: float, *, basis: str, identity: str) -> tuple[float, float] | None:
    """Seconds, low and high; None where no error of this basis is known."""
    own = own_errors(basis, identity)
    errors = own if len(own) >= FEWEST_RUNS else shipped_errors().get(basis, ())
    if not errors:
        return None
    low, high = spread(errors)
    return seconds * (1 + low), seconds * (1 + high)


def spread(errors: Iterable[float]) -> tuple[float, float]:
    """Between which four of five lie."""
    ordered = sorted(errors)
    return _quantile(ordered, _OUTSIDE), _quantile(ordered, 1 - _OUTSIDE)


@cache
def shipped_errors() -> dict[str, tuple[float, ...]]:
    """measured / predicted - 1 of each run that data/step_errors.csv holds, by basis."""
    text = resources.files("brim.speed").joinpath("data", "step_errors.csv").read_text(encoding="utf-8")
    found: dict[str, tuple[float, ...]] = {}
    for row in csv.DictReader(text.splitlines()):
        found[row["basis"]] = (*found.get(row["basis"], ()), float(row["error"]))
    return found


def own_errors(basis: str, identity: str, *, path: Path | None = None) -> Sequence[float]:
    """Of the user's runs on this device, the latest last; damaged lines are passed over."""
    file = path or runs_path()
    try:
        changed = file.stat().st_mtime_ns
    except OSError:
        return []
    return list(_kept(file, changed).get((basis, identity), ()))[-_MOST_RUNS:]


@lru_cache(maxsize=4)
def _kept(path: Path, changed: int) -> Mapping[tuple[str, str], tuple[float, ...]]:
    """Errors of the file by basis and device, read once until it changes: a plan asks for each of its recipes."""
    errors: dict[tuple[str, str], tuple[float, ...]] = {}
    for line in _lines(path):
        try:
            row = json.loads(line)
            if -1 < row["error"] < float("inf"):
                key = (row["basis"], row["identity"])
                errors[key] = (*errors.get(key, ()), float(row["error"]))
        except (ValueError, KeyError, TypeError):
            continue
    return errors


def keep_run(*, basis: str, identity: str, predicted_s: float, measured_s: float, path: Path | None = None) -> None:
    """Add a run's error. A file that cannot be written costs the next band some width, no more."""
    if not basis or predicted_s <= 0 or measured_s <= 0:
        return
    row = {"basis": basis, "identity": identity, "error": measured_s / predicted_s - 1}
    file = path or runs_path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
    except OSError:
        return


def runs_path() -> Path:
    """`$XDG_CACHE_HOME/brim/step_times.jsonl`."""
    return cache_directory() / "step_times.jsonl"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _quantile(ordered: Sequence[float], part: float) -> float:
    """Of ascending values, by linear interpolation."""
    place = part * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
