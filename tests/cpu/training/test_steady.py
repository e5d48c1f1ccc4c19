"""Why there is no longest batch to run first: every step takes what was rehearsed, whatever its rows hold."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from brim.recipe import Training
from brim.rehearsal import rehearse_trace
from brim.training.data import tokenize
from brim.training.job import Run
from brim.training.layouts import Row
from brim.training.loop import run
from brim.training.metrics import StepRecord

MakeRun = Callable[..., Run]


@pytest.mark.parametrize(("family", "packing"), [("llama", True), ("t5", False)])
def test_no_step_takes_more_than_was_rehearsed(family: str, packing: bool, make_run: MakeRun, tokenizer: Any) -> None:
    """One row as long as the recipe allows among short ones, read in whichever step: the second step takes what was
    rehearsed (but for a number or two), and no later one more, so a run that does not fit fails there."""
    job = make_run(family, training=Training(max_steps=6, packing=packing))
    source = "ask" if family == "t5" else ""
    rows = [Row(source, "ab"), Row(source and "ask " * 20, "longer " * 20), *[Row(source, "abc" * 2)] * 15]
    records: list[StepRecord] = []
    run(replace(job, data=tokenize(rows, tokenizer, job.recipe)), on_step=records.append)
    taken = [record.allocated_bytes for record in records]
    assert taken[1] == max(taken) == pytest.approx(rehearse_trace(job.spec, job.recipe).peak_bytes, abs=16)
    assert min(taken[1:]) > 0.95 * max(taken)
