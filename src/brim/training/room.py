"""A full disk stops no run: it says what is missing, waits until there is room, and goes on."""

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from brim.errors import Stopped
from brim.training.job import Watch
from brim.training.ranks import Ranks
from brim.training.workplace import checkpoints_of, error_number, steps_kept
from brim.units import format_bytes

_POLL_S = 5.0
"""Between looks at the disk, at each of which a stop can be asked for."""
_LOOKS = 12
"""After as many looks the write is tried again whatever the disk says: a quota or a reserve does not show there."""
_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


def with_room(write: Callable[[], T], *, output: Path, what: str, need_bytes: int, watch: Watch, ranks: Ranks) -> T:
    """What `write` returns; it is tried until the disk of `output` has room, and must leave nothing when it fails.

    All ranks call this together, and each `write` either works or fails in all of them. Raises Stopped when a stop is
    asked for meanwhile.
    """
    waited = False
    while True:
        try:
            done = write()
        except (OSError, SafetensorError) as error:
            if error_number(error) not in _FULL:
                raise
        else:
            if waited:
                watch.tell(f"there is room again for {what}: going on")
            return done
        if not waited:
            watch.tell(_message(output, what, need_bytes))
        waited = True
        _wait(output, what, need_bytes, watch, ranks)


def _message(output: Path, what: str, need_bytes: int) -> str:
    place, free_bytes = output.absolute().parent, _free_bytes(output)
    missing = format_bytes(need_bytes - free_bytes) if free_bytes < need_bytes else "a quota is full, or some"
    return (
        f"the disk of {place} is full: {what} takes {format_bytes(need_bytes)}, {format_bytes(free_bytes)} are free "
        f"({missing} missing); the run waits and goes on when there is room; a signal ends it, "
        f"with {_kept(output)}"
    )


def _wait(output: Path, what: str, need_bytes: int, watch: Watch, ranks: Ranks) -> None:
    seemed_enough = _free_bytes(output) >= need_bytes
    for _ in range(_LOOKS):
        has_room = not seemed_enough and _free_bytes(output) >= need_bytes
        stop, ready = ranks.highest(watch.should_stop(), has_room and ranks.is_first)
        if stop:
            raise Stopped(
                f"stopped while there was no room for {what}, with {_kept(output)}; free some, then go on with the "
                "same command and --resume"
            )
        if ready:
            return
        time.sleep(_POLL_S)


def _kept(output: Path) -> str:
    steps = steps_kept(output)
    return f"the checkpoint of step {steps} kept in {checkpoints_of(output)}" if steps else "nothing kept"


def _free_bytes(output: Path) -> int:
    return shutil.disk_usage(output.absolute().parent).free
