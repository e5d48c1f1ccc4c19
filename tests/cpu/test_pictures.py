"""Pictures and snapshots of a prediction, opened by what they are made for."""

import pickle
import re
from pathlib import Path

import pytest
from torch.cuda import _memory_viz

from brim.cli import main

ASKED = ["predict", "smollm2-135m", "--seq-len", "32", "--set", "method=lora"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    written = ["--plot", str(folder / "a.html"), "--snapshot", str(folder / "a.pickle"), "--memory", "3GiB"]
    assert main([*ASKED, *written]) == 0
    return folder


def test_pytorch_opens_the_snapshot(drawn: Path) -> None:
    """PyTorch's own pages and summary are made from the file; its summary checks that every byte is accounted for."""
    made = pickle.loads((drawn / "a.pickle").read_bytes())
    assert "<html>" in _memory_viz.trace_plot(made)
    assert "<html>" in _memory_viz.segment_plot(made)
    assert "total_reserved" in _memory_viz.segsum(made)


def test_the_page_needs_no_network(drawn: Path) -> None:
    """One file with the drawing in it: no script, and no address but XML's names."""
    page = (drawn / "a.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<svg" in page and "<script" not in page
    assert not re.findall(r"(?:src|@import|url)\s*[=(]?\s*[\"']?https?:", page)
    assert len(page) < 2_000_000


def test_a_snapshot_needs_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--quick", "--snapshot", str(tmp_path / "a.pickle")]) == 2
    assert "--quick" in capsys.readouterr().err
