"""`SOURCE PLACE KILLS`: conversions killed at random moments and gone on with, until so many kills; prints what it saw.

A process of its own, since it forks: what takes seconds to import is imported once.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from brim.checkpoints import stream
from brim.checkpoints.convert import quantize


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def killed(source: Path, output: Path, after_s: float) -> bool:
    """Whether the run was killed before its end."""
    child = os.fork()
    if not child:
        quantize(source, output, to="int8", resume=True)
        os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0


def main(source: Path, place: Path, kills: int) -> None:
    stream.FLUSH_S = -1.0  # a line in the journal after each chunk, so that there is much to go on from
    quantize(source, place / "first", to="int8")  # what is slow once is not in the time of the next
    started = time.monotonic()
    quantize(source, place / "undisturbed", to="int8")
    whole_s = time.monotonic() - started
    expected, output = contents(place / "undisturbed"), place / "output"
    seen = {"kills": 0, "ends": 0, "gone_on": 0, "different": 0, "strangers": 0}
    journal = place / ".output.partial" / "journal.jsonl"
    chance = random.Random(0)
    while seen["kills"] < kills or not (seen["ends"] and seen["gone_on"]):
        seen["gone_on"] += journal.exists() and journal.read_bytes().count(b"\n") > 1
        # After the last kill the run gets the time to end; a busy machine may not have come to its journal by then.
        enough = seen["kills"] >= kills and seen["gone_on"]
        longest_s = 60 * whole_s if enough else whole_s
        seen["kills"] += killed(source, output, chance.uniform(0, longest_s))
        seen["strangers"] += len({path.name for path in place.iterdir()} - NAMES)
        if output.exists():  # it may appear in the moment of the kill, and is whole then too
            seen["ends"] += 1
            seen["different"] += contents(output) != expected
            shutil.rmtree(output)
    print(json.dumps(seen))


NAMES = {"first", "undisturbed", "output", ".output.partial", ".output.lock"}

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
