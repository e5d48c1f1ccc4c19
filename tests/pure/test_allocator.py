"""The model of the CUDA caching allocator: its invariants by brute force, its rules by hand."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.memory.allocator import Block, CachingAllocator, replay
from brim.memory.trace import Trace
from brim.units import MIB

SIZES = st.one_of(st.integers(1, 4096), st.integers(1, 4 * MIB), st.integers(MIB, 64 * MIB))
STEPS = st.lists(st.tuples(st.booleans(), SIZES, st.integers(0, 10**6)), max_size=120)
MODES = st.booleans()


def run(steps: list[tuple[bool, int, int]], allocator: CachingAllocator) -> list[tuple[Block, int]]:
    """Allocate, or free one that is live; after each step the allocator is checked. Returns what is live."""
    live: list[tuple[Block, int]] = []
    for allocates, nbytes, choice in steps:
        if allocates or not live:
            live.append((allocator.malloc(nbytes), nbytes))
        else:
            allocator.free(live.pop(choice % len(live))[0])
        check(allocator, live)
    return live


def check(allocator: CachingAllocator, live: list[tuple[Block, int]]) -> None:
    spans = sorted((block.address, block.address + block.nbytes) for block, _ in live)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(block.nbytes >= nbytes and block.address % 512 == 0 for block, nbytes in live)
    assert allocator.allocated_bytes == sum(block.nbytes for block, _ in live)
    segments = list(allocator.segments())
    assert allocator.reserved_bytes == sum(block.nbytes for blocks in segments for block in blocks)
    assert allocator.reserved_bytes >= allocator.allocated_bytes
    for blocks in segments:
        assert all(first.address + first.nbytes == second.address for first, second in pairwise(blocks))
        assert not any(first.free and second.free for first, second in pairwise(blocks))
    assert {id(block) for blocks in segments for block in blocks if not block.free} == {id(block) for block, _ in live}


@given(steps=STEPS, expandable=MODES)
def test_blocks_never_overlap_and_bytes_add_up(steps: list[tuple[bool, int, int]], expandable: bool) -> None:
    """At every step no two live blocks share a byte, segments are tiled by blocks, and no two free ones touch."""
    run(steps, CachingAllocator(expandable_segments=expandable))


@given(steps=STEPS, expandable=MODES)
def test_everything_freed_is_whole_again(steps: list[tuple[bool, int, int]], expandable: bool) -> None:
    """When all is freed, each segment is one free block, and nothing is allocated."""
    allocator = CachingAllocator(expandable_segments=expandable)
    for block, _ in run(steps, allocator):
        allocator.free(block)
    assert allocator.allocated_bytes == 0
    assert all(len(blocks) == 1 and blocks[0].free for blocks in allocator.segments())


@given(steps=STEPS)
def test_a_repeated_step_reserves_no_more(steps: list[tuple[bool, int, int]]) -> None:
    """From an empty cache that has served a sequence once, the same sequence of allocations fits without growing."""
    allocator = CachingAllocator()
    sizes = [nbytes for _, nbytes, _ in steps]
    for _ in range(2):
        blocks = [allocator.malloc(nbytes) for nbytes in sizes]
        reserved = allocator.reserved_bytes
        for block in blocks:
            allocator.free(block)
    assert allocator.peak_reserved_bytes == reserved


@pytest.mark.parametrize(
    ("requests", "allocated", "reserved"),
    [
        ([1], 512, 2 * MIB),
        ([513], 1024, 2 * MIB),
        ([MIB] * 3, 3 * MIB, 4 * MIB),
        # the rest of 20 MiB is over 1 MiB: split, and the second request lands in it
        ([2 * MIB, 2 * MIB], 4 * MIB, 20 * MIB),
        # 19.5 of 20 MiB: half a MiB is not split off, and counts as allocated
        ([9.75 * MIB, 9.75 * MIB], 20 * MIB, 20 * MIB),
        ([10 * MIB], 10 * MIB, 10 * MIB),
        ([10 * MIB + 1], 10 * MIB + 512, 12 * MIB),
        ([MIB, MIB + 1], 2 * MIB + 512, 22 * MIB),
    ],
)
def test_rules_by_hand(requests: list[float], allocated: int, reserved: int) -> None:
    """Rounding, pools, segment sizes and the split rule, counted by hand from the allocator's source."""
    allocator = CachingAllocator()
    for nbytes in requests:
        allocator.malloc(int(nbytes))
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


def test_the_smallest_block_that_fits_is_taken() -> None:
    """Best fit: of free blocks of 40 and 24 MiB a request of 20 MiB takes the one of 24."""
    allocator = CachingAllocator()
    large, middle = allocator.malloc(40 * MIB), allocator.malloc(24 * MIB)
    allocator.free(large)
    allocator.free(middle)
    assert allocator.malloc(20 * MIB).address == middle.address
    assert allocator.reserved_bytes == 64 * MIB


@given(steps=STEPS, expandable=MODES)
def test_streams_share_no_segment(steps: list[tuple[bool, int, int]], expandable: bool) -> None:
    """Allocations of two streams in turn reserve what each stream's alone reserve, together."""
    together = CachingAllocator(expandable_segments=expandable)
    alone = [CachingAllocator(expandable_segments=expandable) for _ in range(2)]
    live: list[tuple[Block, Block, CachingAllocator]] = []
    for allocates, nbytes, choice in steps:
        if allocates or not live:
            stream = choice % 2
            live.append((together.malloc(nbytes, stream), alone[stream].malloc(nbytes), alone[stream]))
        else:
            block, other, owner = live.pop(choice % len(live))
            together.free(block)
            owner.free(other)
    check(together, [(block, 0) for block, *_ in live])
    assert together.reserved_bytes == sum(each.reserved_bytes for each in alone)


def test_growing_requests_fragment_segments_and_not_an_expandable_one() -> None:
    """Sequences that grow leave segments too small to reuse; one expandable segment reuses them all."""
    sizes = [size * MIB for size in range(20, 60, 5)]
    plain, expandable = CachingAllocator(), CachingAllocator(expandable_segments=True)
    for allocator in (plain, expandable):
        for size in sizes:
            allocator.free(allocator.malloc(size))
    assert plain.reserved_bytes == 304 * MIB  # each size, rounded up to 2 MiB
    assert expandable.reserved_bytes == 60 * MIB  # the largest, in pages of 20 MiB


def test_a_full_device_gives_unused_segments_back() -> None:
    """Where a segment would pass the limit, free ones go first: reserved stays within it and a retry is counted."""
    allocator = CachingAllocator(limit_bytes=100 * MIB)
    allocator.free(allocator.malloc(60 * MIB))
    allocator.malloc(80 * MIB)
    assert (allocator.reserved_bytes, allocator.num_retries) == (80 * MIB, 1)
    assert allocator.peak_reserved_bytes == 80 * MIB


def test_what_is_held_settles_after_segments_went_back() -> None:
    """What was held before the device was full is no part of what is held for long after; without that, all is."""
    allocator = CachingAllocator(limit_bytes=100 * MIB)
    for size in (30 * MIB, 60 * MIB):
        allocator.free(allocator.malloc(size))
    assert allocator.settled_bytes == allocator.peak_reserved_bytes == 90 * MIB
    allocator.free(allocator.malloc(70 * MIB))
    assert (allocator.settled_bytes, allocator.peak_reserved_bytes) == (70 * MIB, 90 * MIB)


@given(sizes=st.lists(st.integers(0, 32 * MIB), min_size=1, max_size=40))
def test_a_trace_is_replayed_event_by_event(sizes: list[int]) -> None:
    """Replaying a trace gives what the same calls give, and its peak's ledger holds the live bytes."""
    trace, allocator = Trace(), CachingAllocator()
    for nbytes in sizes:
        trace.allocate(nbytes, "activations")
        if nbytes:
            allocator.malloc(nbytes)
    result = replay(trace)
    assert result.allocated_bytes == allocator.allocated_bytes
    assert result.reserved_bytes == allocator.reserved_bytes
    assert trace.ledger_at(result.peak_index).total == sum(sizes)
