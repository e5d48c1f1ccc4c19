"""How long a GPU's host takes for operators and units, learned from published steps, and how far that carries.

Learned: of a grid of round times, those with the least mean absolute error. Judged: each source's, and each model's,
rows by times that the others taught; where the others say nothing of the host, they teach that it takes none.
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from statistics import mean

from benchmarks.published import Case

from brim.speed.bands import spread
from brim.speed.gpu import HostTimes, Parts, with_talk
from brim.speed.roofline import offloaded_s

FILE = Path(__file__).resolve().parent.parent / "src" / "brim" / "speed" / "data" / "host_times.csv"
_OPERATOR_S = tuple(15e-6 * step for step in range(9))
_UNIT_S = (0.0, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A published step and what it is made of."""

    name: str
    source: str
    case: Case
    seconds: float
    parts: Parts

    def error(self, host: HostTimes) -> float:
        """Predicted over measured, less one."""
        spec, recipe = self.case.spec, self.case.recipe
        busy_s = self.parts.busy_s(host) + offloaded_s(spec, recipe)
        return with_talk(busy_s, spec, recipe, self.case.device) / self.seconds - 1


def learned(steps: Sequence[Step]) -> HostTimes:
    """The least of equals, so that nothing is claimed that no step shows."""
    tried = (
        HostTimes(python_s=python, engine_s=engine, unit_s=unit)
        for python, engine, unit in product(_OPERATOR_S, _OPERATOR_S, _UNIT_S)
        # the engine runs without Python, and pays what both pay: dispatch, room for the result, the launch
        if python / 6 <= engine <= python
    )
    return min(tried, key=lambda host: mean(abs(step.error(host)) for step in steps))


def left_out(steps: Sequence[Step], group: Callable[[Step], str]) -> list[tuple[str, float]]:
    """Each step's name and its error by the times that other groups taught; none of a group that is the only one."""
    return [(step.name, step.error(host)) for host, theirs in _turns(steps, group) for step in theirs]


def covered(steps: Sequence[Step], group: Callable[[Step], str]) -> float:
    """Share of steps in the range that other groups' times and errors give."""
    held = []
    for host, theirs in _turns(steps, group):
        others = [_measured_over(step, host) for step in steps if group(step) != group(theirs[0])]
        low, high = spread(others)
        held += [low <= _measured_over(step, host) <= high for step in theirs]
    return mean(held)


def _measured_over(step: Step, host: HostTimes) -> float:
    """Measured over predicted, less one: what a range is made of."""
    return 1 / (1 + step.error(host)) - 1


def _turns(steps: Sequence[Step], group: Callable[[Step], str]) -> Iterable[tuple[HostTimes, list[Step]]]:
    for name in sorted(set(map(group, steps))):
        others = [step for step in steps if group(step) != name]
        if others:
            yield learned(others), [step for step in steps if group(step) == name]


def write(host: HostTimes, steps: Sequence[Step]) -> None:
    sources = len({step.source for step in steps})
    told = f"learned from {len(steps)} published steps of {sources} sources: benchmarks.throughput --learn"
    with FILE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "seconds", "source"])
        writer.writerows((each.name, f"{getattr(host, each.name):.6f}", told) for each in fields(host))
