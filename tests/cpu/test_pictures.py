"""Pictures and snapshots of a prediction, opened by what they are made for."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from torch.cuda import _memory_viz

from brim.cli import main
from brim.training.picture import panels

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


def test_a_run_is_drawn_as_its_metrics_say(tmp_path: Path) -> None:
    """Memory, loss and learning rate of every step are those of metrics.jsonl, and the predicted peak lies across."""
    steps = [{"step": n, "loss": 3.0 / n, "learning_rate": 1e-4 * n, "allocated_bytes": n * 2**30} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    figure = Figure()
    for axes, draw in zip(figure.subplots(2, 1), panels(tmp_path, predicted_bytes=4 * 2**30), strict=True):
        draw(axes)
    memory, loss, rate = ([np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()] for axes in figure.axes)
    assert memory == [[1.0, 2.0, 3.0], [4.0, 4.0]]
    assert loss[0] == [step["loss"] for step in steps]
    assert rate == [[step["learning_rate"] for step in steps]]


def test_a_snapshot_needs_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--quick", "--snapshot", str(tmp_path / "a.pickle")]) == 2
    assert "--quick" in capsys.readouterr().err
