"""`brim predict` asked twice: the second time nothing is rehearsed, and torch is not imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from brim import cli

ASKED = ["predict", "smollm2-135m", "--gpu", "h100", "--seq-len", "16", "--json"]
_AGAIN = f"import sys; from brim import cli; cli.main({ASKED}); sys.exit('torch' in sys.modules)"


def refused(*_: Any, **__: Any) -> Any:
    raise AssertionError("rehearsed again")


def test_the_second_answer_is_the_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Byte for byte, without a rehearsal; with --no-cache there is one."""
    assert cli.main(ASKED) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr("brim.rehearsal.rehearse", refused)
    assert cli.main(ASKED) == 0
    assert capsys.readouterr().out == first
    with pytest.raises(AssertionError, match="rehearsed again"):
        cli.main([*ASKED, "--no-cache"])


def test_a_kept_answer_needs_no_torch(tmp_path: Path) -> None:
    """A process that finds its answer prints what the first did, without importing torch; neither prints warnings."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    first, second = (
        subprocess.run([sys.executable, "-c", _AGAIN], env=environment, capture_output=True, text=True, check=False)
        for _ in range(2)
    )
    assert (first.returncode, second.returncode) == (1, 0), second.stderr
    assert json.loads(second.stdout) == json.loads(first.stdout)
    assert (first.stderr, second.stderr) == ("", "")
