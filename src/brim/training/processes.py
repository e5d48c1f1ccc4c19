"""A command once for each rank on this machine: started together, stopped together, and ended when one fails.

They meet at a file, so no port is open beyond the loopback interface. The first rank has the terminal; what the others
say is kept, and shown when one of them is the reason of an end.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from brim.errors import RanOutOfMemoryError, Stopped

RENDEZVOUS = "BRIM_RENDEZVOUS"
"""Environment variable: the file where local ranks meet; without it they meet where torchrun says."""
_POLL_S = 0.05
_GRACE_S = 10.0
"""For the others to end by themselves after one has failed, and again after they were told to."""


def is_rank() -> bool:
    """Whether this process was started as one of several, by `run_ranks` or by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is alone, or the first of several: the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def run_ranks(command: Sequence[str], count: int, *, environment: Mapping[str, str] | None = None) -> int:
    """The exit code of the rank that ended the others, or 0. SIGINT and SIGTERM are passed on to all of them.

    Raises RanOutOfMemoryError when the system killed one.
    """
    with tempfile.TemporaryDirectory(prefix="brim-ranks-") as place:
        ranks = [_start(command, rank, count, Path(place), environment or {}) for rank in range(count)]
        try:
            with _passing_signals(ranks):
                failed = _wait(ranks)
        finally:
            _end(ranks)
        if failed is None:
            return 0
        code = ranks[failed].returncode
        log = _log_of(Path(place), failed)
        if failed > 0 and ranks[0].returncode != code:  # else the first has said the same
            sys.stderr.write(log.read_text(encoding="utf-8", errors="replace")[-4000:])
        if code == -signal.SIGKILL:
            raise RanOutOfMemoryError(
                f"rank {failed} of {count} was killed, most often by the system when memory ends: choose a smaller "
                "micro_batch_size, and see that nothing else fills the machine; --resume goes on from a checkpoint"
            )
        return code if code >= 0 else 128 - code


def _start(
    command: Sequence[str], rank: int, count: int, place: Path, environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), RENDEZVOUS: str(place / "meet")}
    inherited = dict(os.environ) | dict(environment)
    inherited.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    with nullcontext() if rank == 0 else _log_of(place, rank).open("wb") as log:
        # A session of its own: Ctrl-C in a terminal reaches this process alone, which passes it on once.
        return subprocess.Popen(
            list(command),
            env=inherited | own,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _log_of(place: Path, rank: int) -> Path:
    return place / f"rank-{rank}.log"


def _wait(ranks: "Sequence[subprocess.Popen[bytes]]") -> int | None:
    """Until all have ended, or one has failed and the others had time to: None when all went well, else the cause."""
    patience_ends = None
    while any(rank.poll() is None for rank in ranks):
        now = time.monotonic()
        if patience_ends is None and _cause(ranks) is not None:
            patience_ends = now + _GRACE_S
        elif patience_ends is not None and now > patience_ends:
            break
        time.sleep(_POLL_S)
    return _cause(ranks)


def _cause(ranks: "Sequence[subprocess.Popen[bytes]]") -> int | None:
    """Of the ranks that have failed the one that made the others fail: was killed, or else knows what is wrong."""
    failed = [number for number, rank in enumerate(ranks) if rank.poll() not in (None, 0)]
    return min(failed, key=lambda number: _blame(ranks[number].returncode), default=None)


def _blame(code: int) -> int:
    """Lower for what comes first: a rank that lost another ends as one that was stopped does."""
    if code < 0:
        return 0
    return 2 if code == Stopped.exit_code else 1


def _end(ranks: "Sequence[subprocess.Popen[bytes]]") -> None:
    """None of them outlives this process."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    ends = time.monotonic() + _GRACE_S
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < ends:
        time.sleep(_POLL_S)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()


@contextmanager
def _passing_signals(ranks: "Sequence[subprocess.Popen[bytes]]") -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
