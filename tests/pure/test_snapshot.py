"""A rehearsed trace as a memory snapshot: bytes are conserved, and what PyTorch would draw is what was traced."""

import pickle
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from brim.memory.snapshot import snapshot, write_snapshot
from brim.memory.trace import Block, Trace


def trace_of(sizes: list[int], frees: list[bool]) -> tuple[Trace, list[Block]]:
    trace, live = Trace(), []
    for nbytes, free in zip(sizes, frees, strict=False):
        live.append(trace.allocate(nbytes, "activations"))
        if free:
            trace.free(live.pop(len(live) // 2))
    return trace, live


@given(st.lists(st.integers(1, 30 * 2**20), min_size=1, max_size=40), st.lists(st.booleans(), min_size=40, max_size=40))
def test_bytes_are_conserved(sizes: list[int], frees: list[bool]) -> None:
    """What is allocated less what is freed is what the segments hold; blocks fill their segment; none overlap."""
    trace, live = trace_of(sizes, frees)
    made = snapshot(trace)
    (entries,) = made["device_traces"]

    def total(action: str) -> int:
        return sum(entry["size"] for entry in entries if entry["action"] == action)

    left = sum(block.nbytes for block in live)
    assert total("alloc") - total("free_completed") == left == trace.live_bytes
    assert sum(segment["requested_size"] for segment in made["segments"]) == left
    assert total("segment_alloc") == sum(segment["total_size"] for segment in made["segments"])
    for segment in made["segments"]:
        end = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == end
            end += block["size"]
        assert end == segment["address"] + segment["total_size"]


def test_the_highest_point_is_the_traces(tmp_path: Path) -> None:
    """Adding the file's events up, as memory_viz does, reaches the trace's own peak; owners are its frames."""
    trace = Trace()
    kept = trace.allocate(1000, "weights")
    trace.free(trace.allocate(5000, "activations"))
    trace.allocate(700, "optimizer")
    write_snapshot(tmp_path / "a.pickle", trace)
    made = pickle.loads((tmp_path / "a.pickle").read_bytes())
    live = peak = 0
    for entry in made["device_traces"][0]:
        live += {"alloc": 1, "free_completed": -1}.get(entry["action"], 0) * entry["size"]
        peak = max(peak, live)
    assert (peak, live) == (trace.peak_bytes, kept.nbytes + 700)
    frames = {entry["frames"][0]["name"] for entry in made["device_traces"][0] if entry["frames"]}
    assert frames == {"weights", "activations", "optimizer"}
