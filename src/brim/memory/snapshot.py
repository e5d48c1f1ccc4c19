"""A trace as PyTorch's memory snapshot: what `torch.cuda.memory._dump_snapshot` writes and memory_viz opens.

The trace is served by the model of the caching allocator, so addresses, segments and free blocks are those that it
would have; every allocation carries its owner where PyTorch has the Python frame. Without torch.
"""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brim.memory.allocator import Block, CachingAllocator
from brim.memory.trace import Trace

_BASE = 0x7F0000000000
"""Where a GPU's addresses begin; memory_viz takes 0 for none."""


def write_snapshot(path: Path, trace: Trace) -> None:
    """Writes FILE.pickle for https://pytorch.org/memory_viz (drag the file onto the page)."""
    with path.open("wb") as file:
        # protocol 4: the page's own reader of pickles knows it
        pickle.dump(snapshot(trace), file, protocol=4)


def snapshot(trace: Trace) -> dict[str, Any]:
    """Segments as they are after the last event, and the events that led there."""
    allocator = CachingAllocator()
    held: dict[int, tuple[Block, str, int]] = {}
    entries: list[dict[str, Any]] = []
    for allocated, traced in trace.events:
        if not traced.nbytes:
            continue
        if allocated:
            before = allocator.reserved_bytes
            block = allocator.malloc(traced.nbytes, traced.stream)
            if allocator.reserved_bytes > before:
                entries.append(_entry("segment_alloc", block.address, allocator.reserved_bytes - before, ""))
            held[id(traced)] = (block, traced.line, traced.nbytes)
            entries.append(_entry("alloc", block.address, traced.nbytes, traced.line))
        else:
            block, line, nbytes = held.pop(id(traced))
            address = block.address
            allocator.free(block)
            entries += [_entry(action, address, nbytes, line) for action in ("free_requested", "free_completed")]
    used = {block.address: (line, nbytes) for block, line, nbytes in held.values()}
    return {"segments": list(_segments(allocator, used)), "device_traces": [entries]}


def _segments(allocator: CachingAllocator, used: dict[int, tuple[str, int]]) -> Iterator[dict[str, Any]]:
    for blocks in allocator.segments():
        active = sum(block.nbytes for block in blocks if not block.free)
        yield {
            "device": 0,
            "address": _BASE + blocks[0].address,
            "total_size": sum(block.nbytes for block in blocks),
            "allocated_size": active,
            "active_size": active,
            "requested_size": sum(used[block.address][1] for block in blocks if not block.free),
            "stream": 0,
            "segment_type": "large",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": [],
            "blocks": [_block(block, *used.get(block.address, ("", 0))) for block in blocks],
        }


def _block(block: Block, line: str, nbytes: int) -> dict[str, Any]:
    return {
        "address": _BASE + block.address,
        "size": block.nbytes,
        "requested_size": 0 if block.free else nbytes,
        "state": "inactive" if block.free else "active_allocated",
        "frames": [] if block.free else _frames(line),
    }


def _entry(action: str, address: int, nbytes: int, line: str) -> dict[str, Any]:
    return {
        "action": action,
        "addr": _BASE + address,
        "size": nbytes,
        "stream": 0,
        "time_us": 0,
        "frames": _frames(line) if line else [],
    }


def _frames(line: str) -> list[dict[str, Any]]:
    return [{"name": line, "filename": "ledger", "line": 0}]
