"""What published steps teach of the host."""

from dataclasses import replace

import pytest
from benchmarks.host_times import Step, covered, learned, left_out
from benchmarks.published import Case

from brim.hardware import find
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.speed.gpu import HostTimes, Parts

HOST = HostTimes(python_s=60e-6, engine_s=30e-6, unit_s=3e-3)
SPEC = ModelSpec(name="any", kind="directory", config={}, num_parameters=1, tied_head=True)
CASE = Case(spec=SPEC, recipe=Recipe(model="any"), device=find("a100"))


def step(source: str, *, working_s: float, python: float, engine: float, units: int, slower: float = 1.0) -> Step:
    """As long as its parts say by HOST, times `slower`."""
    parts = Parts(
        working_s=working_s, python_operators=python, engine_operators=engine, adapter_units=units, block_units=units
    )
    return Step(name=source, source=source, case=CASE, seconds=slower * parts.busy_s(HOST), parts=parts)


BOUND = [
    step("a", working_s=0.1, python=5000, engine=4000, units=0),
    step("b", working_s=0.1, python=9000, engine=2000, units=0),
    step("c", working_s=0.1, python=4000, engine=4000, units=100),
    step("d", working_s=0.1, python=2000, engine=2000, units=200),
]
FREE = [step(name, working_s=9.0, python=100, engine=100, units=0) for name in "ef"]


def source_of(one: Step) -> str:
    return one.source


def test_the_times_that_made_the_steps_are_found() -> None:
    """And by others' steps, too, where these show all three."""
    assert learned([*BOUND, *FREE]) == HOST
    more = [*BOUND, *(step(name, working_s=0.1, python=7000, engine=3000, units=50) for name in "gh")]
    assert all(error == pytest.approx(0, abs=1e-9) for _, error in left_out(more, source_of))


def test_steps_that_show_no_host_teach_none() -> None:
    """The least time of those that fit as well."""
    assert learned(FREE) == HostTimes(python_s=0.0, engine_s=0.0, unit_s=0.0)


def test_a_range_holds_those_that_are_like_the_others() -> None:
    """Of steps one of which is twice as slow as all others tell, all but that one."""
    alike = [step(str(n), working_s=9.0, python=1, engine=1, units=0, slower=1 + n % 3 / 100) for n in range(9)]
    odd = step("odd", working_s=9.0, python=1, engine=1, units=0, slower=2)
    assert covered([*alike, odd], source_of) == pytest.approx(0.9)


def test_a_host_that_asks_the_device_works_in_turns_with_it() -> None:
    """What Python asks for is added to the device's time, and not hidden by it; the engine runs ahead all the same."""
    ahead = Parts(working_s=2.0, python_operators=5000, engine_operators=4000, adapter_units=0, block_units=0)
    assert ahead.busy_s(HOST) == 2.0
    assert replace(ahead, asks_device=True).busy_s(HOST) == pytest.approx(2.0 + 5000 * HOST.python_s)
