"""A loss that is no number or far above the others: what is said, kept, left out and learned then."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from brim.errors import RecipeError, Stopped, UsageError
from brim.recipe import Optimizer, Recipe, Training
from brim.training import loop, setbacks
from brim.training.build import Workload, build
from brim.training.job import Run
from brim.training.loop import run
from brim.training.metrics import StepRecord
from brim.training.schedule import learning_rate
from brim.training.setbacks import batch_number, is_spike
from brim.training.step import train_step
from brim.training.workplace import checkpoints_of

MakeRun = Callable[..., Run]
STEPS = 8
BACK = Training(max_steps=STEPS, save_every=2, on_spike="rollback")


@given(left_out=st.sets(st.integers(0, 30)), step=st.integers(0, 30))
def test_batches_move_up(left_out: set[int], step: int) -> None:
    """Step k reads the k-th of the batches that are not left out."""
    assert batch_number(step, left_out) == [number for number in range(80) if number not in left_out][step]


@settings(max_examples=50)
@given(losses=st.lists(st.floats(0.01, 9.0), min_size=20, max_size=120), scale=st.floats(0.1, 3.0))
def test_what_a_spike_is(losses: list[float], scale: float) -> None:
    """A loss up to twice the middle one is none whatever the others, nor is one within half a nat above it, nor any
    among few; ten times the others and ten more is, where they are alike."""
    usual = sorted(losses[-100:])
    middle = usual[(len(usual) - 1) // 2]
    assert not is_spike(losses, middle * 2)
    assert not is_spike(losses, middle + 0.5)
    assert not is_spike(losses[:2], 1e9)
    assert not is_spike(losses, math.nan)
    assert is_spike([scale] * 20, 10 * scale + 10)


def test_spikes_are_found_in_noise() -> None:
    """Among normally spread losses one of ten thousand usual ones at the most is called a spike, a doubled one is."""
    generator = torch.Generator().manual_seed(0)
    losses = (2.0 + 0.2 * torch.randn(10_000, generator=generator)).tolist()
    assert sum(is_spike(losses[:index], loss) for index, loss in enumerate(losses)) == 0
    assert is_spike(losses[:50], 4.5)


def poisoned(bad: Sequence[tuple[int, ...]], *, loss: float | None) -> Callable[..., torch.Tensor]:
    """The real step; over batches with these input ids the loss is what is given, or a gradient is NaN."""

    def step(workload: Workload, batches: Any, *, learning_rate: float) -> torch.Tensor:
        is_bad = any(tuple(row) in bad for batch in batches for row in batch.input_ids.tolist())
        if is_bad and loss is None:
            hook = next(iter(workload.trainable.values())).register_hook(lambda gradient: gradient * math.nan)
            try:
                return train_step(workload, batches, learning_rate=learning_rate)
            finally:
                hook.remove()
        real = train_step(workload, batches, learning_rate=learning_rate)
        return torch.tensor(loss) if is_bad else real

    return step


def rows_of(job: Run, batch: int) -> list[tuple[int, ...]]:
    return [tuple(job.data.input_ids[row].tolist()) for row in job.data.step_rows(job.recipe, batch)]


def without(job: Run, left_out: set[int]) -> dict[str, torch.Tensor]:
    """The weights that the same steps give over the other batches, by hand."""
    torch.manual_seed(job.recipe.training.seed)
    workload = build(job.recipe, job.spec, weights=job.weights)
    batches = [number for number in range(STEPS + len(left_out)) if number not in left_out]
    for step, number in enumerate(batches[:STEPS]):
        rate = learning_rate(job.recipe, step, STEPS)
        train_step(workload, job.data.step_batches(job.recipe, number), learning_rate=rate)
    return {name: parameter.detach() for name, parameter in workload.base.named_parameters()}


def assert_learned(output: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(output / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setbacks, "_FEWEST", 3)


@pytest.mark.parametrize("loss", [None, 40.0], ids=["nan", "spike"])
def test_a_run_goes_back_without_the_rows(
    loss: float | None, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of step 6 are bad: the run says which they are, goes back to step 4, and ends with bitwise the weights of a
    run that never had them; each step is written once, and the report says what was left out."""
    job, told, records = make_run("gpt2", training=BACK), list[str](), list[StepRecord]()
    monkeypatch.setattr(loop, "train_step", poisoned(rows_of(job, 5), loss=loss))
    report = run(job, tell=told.append, on_step=records.append)
    assert_learned(job.output, without(job, {5}))
    (said,) = told
    rows = ", ".join(str(row + 1) for row in job.data.step_rows(job.recipe, 5))
    assert f"the loss of step 6 is {'nan' if loss is None else '40.0000'}" in said
    assert f"over rows {rows} of" in said and said.endswith("going back to step 4, and on without those rows")
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert len((job.output / "metrics.jsonl").read_text().splitlines()) == STEPS
    assert [reason for reason in report.reasons if f"rows {rows} of" in reason]


def test_a_run_that_went_back_resumes(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stopped before or after it has passed the rows that were bad, a run that went back ends as it would have."""
    calm = make_run("gpt2", training=BACK, output=tmp_path / "calm")
    monkeypatch.setattr(loop, "train_step", poisoned(rows_of(calm, 5), loss=None))
    run(calm)
    for step in (5, 7):
        job = make_run("gpt2", training=BACK, output=tmp_path / str(step))
        stopped_after_going_back(job, step)
        run(replace(job, resume=True))
        assert_learned(job.output, load_file(calm.output / "model.safetensors"))


def stopped_after_going_back(job: Run, step: int) -> None:
    told, done = list[str](), list[int]()
    with pytest.raises(Stopped):
        run(
            job,
            tell=told.append,
            on_step=lambda record: done.append(record.step),
            should_stop=lambda: bool(told) and done[-1:] == [step],
        )


def test_weights_without_numbers_are_not_gone_back_to(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without clipping a NaN reaches the weights in step 4, whose checkpoint is not written; step 5 shows it, and the
    run goes back to step 2 without the rows of both."""
    job, told = make_run("llama", training=BACK, optimizer=Optimizer(max_grad_norm=0.0)), list[str]()
    monkeypatch.setattr(loop, "train_step", poisoned(rows_of(job, 3), loss=None))
    run(job, tell=told.append)
    assert "the loss of step 5 is nan" in told[0] and "step before" in told[0]
    assert_learned(job.output, without(job, {3, 4}))


def test_it_goes_back_a_few_times_only(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of ever more steps are not at fault: after three the run ends, and says so."""
    job, told = make_run("llama", training=BACK), list[str]()
    monkeypatch.setattr(loop, "train_step", poisoned([row for number in range(4, 9) for row in rows_of(job, number)],
                                                     loss=math.inf))  # fmt: skip
    with pytest.raises(
        UsageError, match=r"loss of step 5 is inf.*those of 3 steps were left out.*holds what was learned"
    ):
        run(job, tell=told.append)
    assert len(told) == 3


def test_a_spike_is_told_or_the_end(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By default a spike is a word. "stop" ends the run and keeps the checkpoint before it, from which the run goes on
    without those rows when that is asked for, and only that is another way to go on."""
    training = replace(BACK, on_spike="tell")
    job, told = make_run("llama", training=training, output=tmp_path / "told"), list[str]()
    monkeypatch.setattr(loop, "train_step", poisoned(rows_of(job, 5), loss=40.0))
    run(job, tell=told.append)
    (said,) = told
    assert "the loss of step 6 is 40.0000 (" in said
    assert_learned(job.output, without(job, set()))
    job = make_run("llama", training=replace(BACK, on_spike="stop"), output=tmp_path / "stopped")
    with pytest.raises(UsageError, match=r"far above those before it.*holds what was learned.*on_spike"):
        run(job)
    assert [path.name for path in checkpoints_of(job.output).iterdir()] == ["step-00000004"]
    other = replace(job, resume=True, recipe=replace(job.recipe, training=replace(BACK, seed=3)))
    with pytest.raises(UsageError, match="belongs to another recipe"):
        run(other)
    back = replace(job, resume=True, recipe=replace(job.recipe, training=BACK))
    run(back)
    assert_learned(job.output, without(job, {5}))
    assert Recipe.from_toml(job.output / "recipe.toml") == back.recipe


def test_a_stop_keeps_something(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checkpoint before the spike the state after it is kept, and gone on from."""
    job = make_run("llama", training=Training(max_steps=STEPS, on_spike="stop"))
    monkeypatch.setattr(loop, "train_step", poisoned(rows_of(job, 5), loss=40.0))
    with pytest.raises(UsageError, match="holds what was learned"):
        run(job)
    run(replace(job, resume=True))
    assert_learned(job.output, without(job, set()))


def test_going_back_needs_a_checkpoint() -> None:
    """A recipe that goes back and writes no checkpoint is refused."""
    with pytest.raises(RecipeError, match=r"nearest: training.save_every = 100"):
        Recipe(model="any", training=Training(on_spike="rollback"))
