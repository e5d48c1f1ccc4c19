"""Model of PyTorch's CUDA caching allocator: what it reserves for a sequence of allocations and frees.

Rules of torch 2.13 (c10/core/AllocatorConfig.h, c10/cuda/CUDACachingAllocator.cpp), default settings:

- A request is rounded up to 512 B. Up to 1 MiB it is served by the small pool, else by the large one.
- Each stream has its own two pools: what was allocated in one serves no other (`BlockComparatorSize` orders by stream).
- The smallest free block that holds it is taken, the lowest address first among equals.
- Without one a segment is made: 2 MiB in the small pool; 20 MiB for a request under 10 MiB; else the request rounded
  up to 2 MiB.
- What is left of a block becomes a free block if it is at least 512 B (small pool), or over 1 MiB (large pool); else
  it counts as allocated with the rest.
- A freed block joins its free neighbours of the same segment. Segments go back only when the device is full.
- `expandable_segments`: a pool is one segment that grows page by page (2 MiB; 20 MiB in the large pool); every rest
  of at least 512 B is split off.

Ignored: the order of the driver's addresses (it breaks ties only), blocks that wait for another stream's work
(`record_stream`), CUDA graphs.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from brim.memory.trace import Trace

ROUNDING = 512
SMALL_REQUEST = 2**20
SMALL_SEGMENT = 2 * 2**20
MIDDLE_REQUEST = 10 * 2**20
MIDDLE_SEGMENT = 20 * 2**20
SEGMENT_ROUNDING = 2 * 2**20


class Block:
    """A range of a segment, in use or free, between its neighbours."""

    __slots__ = ("address", "following", "free", "nbytes", "pool", "preceding")

    def __init__(self, address: int, nbytes: int, pool: "_Pool") -> None:
        self.address = address
        self.nbytes = nbytes
        self.pool = pool
        self.free = True
        self.preceding: Block | None = None
        self.following: Block | None = None

    @property
    def is_segment(self) -> bool:
        return self.preceding is None and self.following is None


class _Pool:
    """Free blocks by size and address."""

    __slots__ = ("_blocks", "base", "is_small", "least_rest_bytes", "page_bytes", "tail")

    def __init__(self, *, is_small: bool, least_rest_bytes: int, page_bytes: int, base: int) -> None:
        self.is_small = is_small
        self.base = base
        """Address of the expandable segment."""
        self.least_rest_bytes = least_rest_bytes
        self.page_bytes = page_bytes
        """By which an expandable segment grows."""
        self.tail: Block | None = None
        """Last block of the expandable segment; None before there is one."""
        self._blocks: list[tuple[int, int, Block]] = []

    def add(self, block: Block) -> None:
        insort(self._blocks, (block.nbytes, block.address, block))

    def remove(self, block: Block) -> None:
        del self._blocks[bisect_left(self._blocks, (block.nbytes, block.address))]

    def best_fit(self, nbytes: int) -> Block | None:
        """The smallest that holds it, taken out; the growing end of an expandable segment comes last."""
        index = bisect_left(self._blocks, (nbytes,))
        if index < len(self._blocks) and self._blocks[index][2] is self.tail and index + 1 < len(self._blocks):
            index += 1
        return self._blocks.pop(index)[2] if index < len(self._blocks) else None

    def whole_segments(self) -> list[Block]:
        return [block for _, _, block in self._blocks if block.is_segment and block is not self.tail]


class CachingAllocator:
    """Serves `malloc` and `free` by the rules above, and counts."""

    def __init__(self, *, expandable_segments: bool = False, limit_bytes: int | None = None) -> None:
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self.settled_bytes = 0
        """Highest since segments were last given back."""
        self.num_retries = 0
        """Times that the device was full and unused segments were given back."""
        self._expandable = expandable_segments
        self._limit_bytes = limit_bytes
        self._next_address = 0
        large_rest = ROUNDING if expandable_segments else SMALL_REQUEST + ROUNDING
        self._large_rest_bytes = large_rest
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._heads: dict[int, Block] = {}

    def malloc(self, nbytes: int, stream: int = 0) -> Block:
        """A block of at least `nbytes`, which must be more than zero, for what runs in this stream."""
        assert nbytes > 0
        size = _rounded(nbytes, ROUNDING)
        pool = self._pool(stream, is_small=size <= SMALL_REQUEST)
        block = pool.best_fit(size) or (self._grown(pool, size) if self._expandable else self._segment(pool, size))
        block.free = False
        if block.nbytes - size >= pool.least_rest_bytes:
            pool.add(self._split(block, size))
        self.allocated_bytes += block.nbytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        assert not block.free, "freed twice"
        block.free = True
        self.allocated_bytes -= block.nbytes
        pool = block.pool
        for neighbour in (block.preceding, block.following):
            if neighbour is not None and neighbour.free:
                pool.remove(neighbour)
                block = self._joined(*((neighbour, block) if neighbour is block.preceding else (block, neighbour)))
        pool.add(block)

    def segments(self) -> Iterator[list[Block]]:
        """Each segment's blocks in order of address."""
        for head in self._heads.values():
            blocks, block = [], head
            while True:
                blocks.append(block)
                if block.following is None:
                    break
                block = block.following
            yield blocks

    def _pool(self, stream: int, *, is_small: bool) -> _Pool:
        pool = self._pools.get((stream, is_small))
        if pool is None:
            # far apart: those of expandable segments grow
            base = (2 * len(self._pools) + 1) * 2**60
            least, page = (ROUNDING, SMALL_SEGMENT) if is_small else (self._large_rest_bytes, MIDDLE_SEGMENT)
            pool = _Pool(is_small=is_small, least_rest_bytes=least, page_bytes=page, base=base)
            self._pools[stream, is_small] = pool
        return pool

    def _segment(self, pool: _Pool, size: int) -> Block:
        if pool.is_small:
            nbytes = SMALL_SEGMENT
        else:
            nbytes = MIDDLE_SEGMENT if size < MIDDLE_REQUEST else _rounded(size, SEGMENT_ROUNDING)
        self._make_room(nbytes)
        block = self._heads[self._next_address] = Block(self._next_address, nbytes, pool)
        self._next_address += nbytes
        self._reserve(nbytes)
        return block

    def _grown(self, pool: _Pool, size: int) -> Block:
        """The end of the pool's segment, made longer until it holds `size`."""
        tail = pool.tail
        held = tail.nbytes if tail is not None and tail.free else 0
        grown = _rounded(size - held, pool.page_bytes)
        self._reserve(grown)
        if tail is None:
            pool.tail = self._heads[pool.base] = Block(pool.base, grown, pool)
            return pool.tail
        if tail.free:
            pool.remove(tail)
            tail.nbytes += grown
            return tail
        block = Block(tail.address + tail.nbytes, grown, pool)
        block.preceding, tail.following, pool.tail = tail, block, block
        return block

    def _split(self, block: Block, size: int) -> Block:
        """The free rest beyond the first `size` bytes."""
        rest = Block(block.address + size, block.nbytes - size, block.pool)
        rest.preceding, rest.following = block, block.following
        if rest.following is not None:
            rest.following.preceding = rest
        block.following, block.nbytes = rest, size
        if block.pool.tail is block:
            block.pool.tail = rest
        return rest

    def _joined(self, first: Block, second: Block) -> Block:
        first.nbytes += second.nbytes
        first.following = second.following
        if first.following is not None:
            first.following.preceding = first
        if first.pool.tail is second:
            first.pool.tail = first
        return first

    def _make_room(self, nbytes: int) -> None:
        """Where the device is full, segments without a live block go back first."""
        if self._limit_bytes is None or self.reserved_bytes + nbytes <= self._limit_bytes:
            return
        self.num_retries += 1
        for pool in self._pools.values():
            for block in pool.whole_segments():
                pool.remove(block)
                del self._heads[block.address]
                self.reserved_bytes -= block.nbytes
        self.settled_bytes = self.reserved_bytes

    def _reserve(self, nbytes: int) -> None:
        self.reserved_bytes += nbytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        self.settled_bytes = max(self.settled_bytes, self.reserved_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """What the allocator held for a trace."""

    allocated_bytes: int
    """Highest sum of blocks in use: `torch.cuda.max_memory_allocated`."""
    reserved_bytes: int
    """Highest sum of segments: `torch.cuda.max_memory_reserved`."""
    settled_bytes: int
    """The same since the device was last full and unused segments went back: what is there for long."""
    peak_index: int
    """Events of the trace up to the moment of the allocated peak."""
    num_retries: int
    moments: tuple[tuple[str, int], ...] = ()
    """The allocated peak of each of the trace's moments."""


def replay(trace: Trace, *, expandable_segments: bool = False, limit_bytes: int | None = None) -> Reserved:
    """Serve a trace's allocations and frees in order. A trace of nothing reserves nothing."""
    allocator = CachingAllocator(expandable_segments=expandable_segments, limit_bytes=limit_bytes)
    held: dict[int, Block] = {}
    peak = peak_index = 0
    moments = list[int]()
    for index, (allocated, traced) in enumerate(trace.events, start=1):
        while len(moments) < len(trace.moments) and trace.moments[len(moments)][1] < index:
            moments.append(allocator.allocated_bytes)
        if not traced.nbytes:
            continue
        if allocated:
            held[id(traced)] = allocator.malloc(traced.nbytes, traced.stream)
            if allocator.allocated_bytes > peak:
                peak, peak_index = allocator.allocated_bytes, index
            if moments:
                moments[-1] = max(moments[-1], allocator.allocated_bytes)
        else:
            allocator.free(held.pop(id(traced)))
    return Reserved(
        allocated_bytes=peak,
        reserved_bytes=allocator.peak_reserved_bytes,
        settled_bytes=allocator.settled_bytes,
        peak_index=peak_index,
        num_retries=allocator.num_retries,
        moments=tuple(zip((name for name, _ in trace.moments), moments, strict=False)),
    )


def _rounded(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
