"""Kills at random moments of a run of 60 steps: a few here, `BRIM_KILLS=100` of them in `make kills`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

KILLS = int(os.environ.get("BRIM_KILLS", "4"))


@pytest.mark.timeout(120 + 30 * KILLS)
def test_kills_at_random_moments_change_nothing(tiny_directory: Callable[[str], Path], tmp_path: Path) -> None:
    """However often a run is killed, the one that comes to its end has bitwise the weights and the losses of an
    undisturbed run, and nothing but its workplace was ever beside it."""
    place = tmp_path / "place"
    place.mkdir()
    script = Path(__file__).with_name("kills.py")
    command = [sys.executable, "-W", "ignore", str(script), str(tiny_directory("llama")), str(place), str(KILLS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["kills"] >= KILLS
    assert seen["ends"] > 0
    assert seen["gone_on"] > 0
    assert (seen["different"], seen["strangers"]) == (0, 0)
    if KILLS > 50:
        print(seen)
