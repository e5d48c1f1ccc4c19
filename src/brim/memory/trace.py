"""`Trace`: allocations and frees in order, and the ledger at their worst moment.

What has no bytes (a parameter that is not gathered now) allocates nothing, and is no event.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from brim.report import LEDGER_LINES, Ledger


@dataclass(slots=True)
class Block:
    """One live range of bytes; its line may be claimed by another owner later."""

    nbytes: int
    line: str
    """A ledger line, or a part of one: `activations/kv_cache`."""
    module: str = ""
    """Whose it is, where a rehearsal watches modules."""
    stream: int = 0
    """Of the device, in which it was allocated: 0 is that of the computation."""


class Trace:
    """What was allocated and freed, block by block, since the trace began."""

    def __init__(self) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0
        self.host: Trace | None = None
        """What is meanwhile in the host's memory, where that is not the device's and something is offloaded."""
        self.moments: list[tuple[str, int]] = []
        """Parts of a run by name, each with the number of events before it."""
        self._events: list[tuple[bool, Block]] = []
        self._peak_index = 0

    def allocate(self, nbytes: int, line: str, stream: int = 0) -> Block:
        """A new live block on this ledger line."""
        assert line_of(line) in LEDGER_LINES, line
        block = Block(nbytes, line, stream=stream)
        if nbytes:
            self._events.append((True, block))
        self.live_bytes += nbytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self._peak_index = len(self._events)
        return block

    def free(self, block: Block) -> None:
        if block.nbytes:
            self._events.append((False, block))
        self.live_bytes -= block.nbytes
        assert self.live_bytes >= 0, "more was freed than allocated"

    def begin(self, moment: str) -> None:
        """What happens from here on is this part of the run."""
        self.moments.append((moment, len(self._events)))

    def moment_peaks(self) -> list[tuple[str, int]]:
        """Each moment's highest live bytes, of the moments that were begun; what lives when one begins counts."""
        if not self.moments:
            return []
        peaks, live, done = list[tuple[str, int]](), 0, 0
        ends = [start for _, start in self.moments[1:]] + [len(self._events)]
        for (name, start), end in zip(self.moments, ends, strict=True):
            live += sum(block.nbytes if allocated else -block.nbytes for allocated, block in self._events[done:start])
            highest = live
            for allocated, block in self._events[start:end]:
                live += block.nbytes if allocated else -block.nbytes
                highest = max(highest, live)
            peaks.append((name, highest))
            done = end
        return peaks

    @property
    def events(self) -> Sequence[tuple[bool, Block]]:
        """(allocated, block) in order; False is the block's end."""
        return self._events

    @property
    def peak_index(self) -> int:
        """Events up to the worst moment."""
        return self._peak_index

    def peak_ledger(self) -> Ledger:
        """Bytes by owner at the worst moment; each block counts for its last claimed owner."""
        return self.ledger_at(self._peak_index)

    def ledger_at(self, index: int) -> Ledger:
        """Bytes by owner after the first `index` events."""
        lines = dict.fromkeys(LEDGER_LINES, 0)
        for allocated, block in self._events[:index]:
            lines[line_of(block.line)] += block.nbytes if allocated else -block.nbytes
        return Ledger(**lines)

    def bytes_at(self, index: int, part: str) -> int:
        """Bytes of one part of a line after the first `index` events."""
        events = self._events[:index]
        return sum(block.nbytes if allocated else -block.nbytes for allocated, block in events if block.line == part)

    def forget_past(self) -> None:
        """Start over with what is alive now, so that a long run's trace stays short; the host's, too."""
        if self.host is not None:
            self.host.forget_past()
        alive: dict[int, Block] = {}
        for allocated, block in self._events:
            if allocated:
                alive[id(block)] = block
            else:
                del alive[id(block)]
        self._events = [(True, block) for block in alive.values()]
        self._peak_index = len(self._events)
        self.peak_bytes = self.live_bytes
        self.moments.clear()
        assert sum(block.nbytes for block in alive.values()) == self.live_bytes


def line_of(owner: str) -> str:
    """The ledger line of a block's owner: `activations` for `activations/kv_cache`."""
    return owner.partition("/")[0]
