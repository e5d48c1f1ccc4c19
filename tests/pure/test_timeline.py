"""Memory over time: the few moments that are drawn keep the trace's peak and its ledger."""

from hypothesis import given
from hypothesis import strategies as st

from brim.memory.timeline import timeline
from brim.memory.trace import Trace
from brim.report import LEDGER_LINES


@given(st.lists(st.tuples(st.integers(1, 10**9), st.sampled_from(LEDGER_LINES), st.booleans()), min_size=1))
def test_the_peak_is_drawn(events: list[tuple[int, str, bool]]) -> None:
    """However many events there are, at most 801 moments are kept, and the highest is the trace's own peak."""
    trace = Trace()
    for nbytes, line, free in events * 40:
        block = trace.allocate(nbytes, line)
        if free:
            trace.free(block)
    seen = timeline(trace)
    assert len(seen.moments) <= 801
    assert seen.moments == sorted(seen.moments)
    assert sum(line[seen.peak] for line in seen.lines.values()) == trace.peak_bytes
    assert {line: column[seen.peak] for line, column in seen.lines.items()} == trace.ledger_at(
        seen.moments[seen.peak]
    ).to_dict()
