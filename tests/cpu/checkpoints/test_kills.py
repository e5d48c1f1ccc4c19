"""Kills at random moments: a few here, `BRIM_KILLS=200` of them in `make kills`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Maker = Callable[..., Path]
KILLS = int(os.environ.get("BRIM_KILLS", "8"))


@pytest.mark.timeout(30 + 20 * KILLS)
def test_kills_at_random_moments_leave_no_trace(tiny: Maker, tmp_path: Path) -> None:
    """Whenever a conversion is killed, nothing but the hidden workplace is there; the run that ends after any number of
    kills gives what an undisturbed one gives, byte by byte."""
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), str(tiny("untied")), str(place), str(KILLS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen["kills"] >= KILLS
    assert seen["ends"] > 0
    assert seen["gone_on"] > 0
    assert (seen["different"], seen["strangers"]) == (0, 0)
    if KILLS > 100:
        print(seen)
