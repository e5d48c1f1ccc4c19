"""Traces of loops, continued from three short ones, against the loops themselves run longer."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from brim.memory.splice import continued, ordered
from brim.memory.trace import Block, Trace

SIZES = st.sampled_from([4, 64, 256, 1024])
LINES = st.sampled_from(["activations", "gradients"])
PASSES = st.lists(
    st.tuples(st.sampled_from(["forward", "list", "pair", "total"]), SIZES, LINES), min_size=1, max_size=6
)


def events(trace: Trace) -> list[tuple[bool, int, str, int]]:
    """What happened, with each block named by the order of its birth."""
    names: dict[int, int] = {}
    return [
        (allocated, block.nbytes, block.line, names.setdefault(id(block), len(names)))
        for allocated, block in ordered(trace)
    ]


def run(program: list[tuple[str, int, str]], num_blocks: int) -> Trace:
    """A step of a model with this many blocks.

    forward: keeps a tensor a block, backward frees them from the last on; list: one a block, freed in their order;
    pair: a temporary in each block; total: one tensor with an entry for each block.
    """
    trace, kept = Trace(), list[list[Block]]()
    for kind, nbytes, line in program:
        if kind == "pair":
            for _ in range(num_blocks):
                trace.free(trace.allocate(nbytes, line))
        elif kind == "total":
            trace.free(trace.allocate(nbytes * num_blocks, line))
        else:
            blocks = [trace.allocate(nbytes, line) for _ in range(num_blocks)]
            kept.append(blocks[::-1] if kind == "forward" else blocks)
    for blocks in reversed(kept):
        for block in blocks:
            trace.allocate(8, "workspace")
            trace.free(block)
    return trace


@given(PASSES, st.integers(1, 3), st.integers(4, 12))
@example([("forward", 4, "activations"), ("forward", 4, "gradients"), ("list", 4, "gradients")], 1, 4)
@example([("list", 64, "gradients"), ("forward", 64, "gradients")], 1, 4)
@settings(deadline=None, max_examples=150)
def test_what_is_continued_is_the_longer_run(program: list[tuple[str, int, str]], shortest: int, longest: int) -> None:
    """Whatever the loops, three short runs continued are the long run, event by event, or there is no answer."""
    first, second, third = (run(program, shortest + more) for more in range(3))
    spliced = continued((first, second, third), times=longest - shortest)
    if spliced is not None:
        whole = run(program, longest)
        assert events(spliced) == events(whole)
        assert spliced.peak_bytes == whole.peak_bytes
        assert spliced.peak_ledger() == whole.peak_ledger()


def test_a_step_like_a_models_is_continued() -> None:
    """Forward, an optimizer's list and a norm of all: three short runs show it all."""
    program = [("forward", 1024, "activations"), ("pair", 256, "activations"), ("list", 64, "gradients"),
               ("total", 4, "workspace")]  # fmt: skip
    spliced = continued((run(program, 1), run(program, 2), run(program, 3)), times=79)
    assert spliced is not None
    assert events(spliced) == events(run(program, 80))


def _grows_late(num_blocks: int) -> int:
    return 64 if num_blocks < 3 else 128


def _grows_faster_and_faster(num_blocks: int) -> int:
    return 64 * num_blocks * num_blocks


@pytest.mark.parametrize("size_of", [_grows_late, _grows_faster_and_faster])
def test_what_does_not_go_on_evenly_is_not_continued(size_of: Callable[[int], int]) -> None:
    """A size that changes at some length, or grows with its square, is no straight line: no answer."""

    def step(num_blocks: int) -> Trace:
        trace = run([("forward", 1024, "activations")], num_blocks)
        trace.allocate(size_of(num_blocks), "workspace")
        return trace

    assert continued((step(1), step(2), step(3)), times=9) is None


@pytest.mark.parametrize("order", ["youngest", "oldest"])
def test_the_order_of_frees_without_an_allocation_between_is_nothing(order: Any) -> None:
    """Alike blocks that are freed together may be freed in either order: the same events."""
    trace = Trace()
    blocks = [trace.allocate(64, "activations") for _ in range(4)]
    for block in blocks if order == "oldest" else blocks[::-1]:
        trace.free(block)
    assert [name for allocated, *_, name in events(trace) if not allocated] == [3, 2, 1, 0]
