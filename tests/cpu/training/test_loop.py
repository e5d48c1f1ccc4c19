"""A whole run: what it writes is what was trained, measured and asked for; what fails leaves nothing half-made."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from brim.errors import BrimError, DoesNotFitError, RanOutOfMemoryError, RecipeError, UsageError
from brim.models import describe
from brim.recipe import Lora, Memory, Optimizer, Precision, Recipe, Training
from brim.training import loop
from brim.training.build import Workload, build
from brim.training.ending import environment
from brim.training.job import Run
from brim.training.loop import run
from brim.training.metrics import StepRecord
from brim.training.schedule import learning_rate
from brim.training.step import train_step
from brim.training.workplace import workplace_of

MakeRun = Callable[..., Run]
KEYS = {"step", "loss", "learning_rate", "tokens_per_s", "allocated_bytes"}


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def by_hand(job: Run) -> Workload:
    """The same steps without the loop."""
    torch.manual_seed(job.recipe.training.seed)
    workload = build(job.recipe, job.spec, weights=job.weights)
    steps = job.data.steps(job.recipe)
    for step in range(steps):
        rate = learning_rate(job.recipe, step, steps)
        train_step(workload, job.data.step_batches(job.recipe, step), learning_rate=rate)
    return workload


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("gpt2", {"precision": Precision(weights="bf16", compute="bf16", master="fp32")}),
        ("t5", {}),
        ("gpt2", {"method": "lora", "lora": Lora(rank=2)}),
        ("t5", {"method": "lora", "lora": Lora(rank=2, targets=("q",))}),
    ],
)
def test_output_is_the_trained_model(family: str, settings: dict[str, Any], make_run: MakeRun) -> None:
    """transformers (and PEFT) load from OUTPUT bitwise the weights that the same steps by hand give."""
    job = make_run(family, **settings)
    run(job)
    trained = by_hand(job)
    kind: Any = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    if job.recipe.method == "lora":
        base = kind.from_pretrained(job.recipe.model, dtype=trained.base.dtype)
        loaded = PeftModel.from_pretrained(base, str(job.output))
    else:
        loaded = kind.from_pretrained(job.output, dtype="auto")
        before = json.loads((job.weights / "config.json").read_text())
        after = json.loads((job.output / "config.json").read_text())
        assert after == {**before, "dtype": after["dtype"]}
        assert describe(str(job.output)).num_parameters == job.spec.num_parameters
    expected = dict(trained.model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == expected[name].dtype
        assert torch.equal(parameter, expected[name]), name
    assert AutoTokenizer.from_pretrained(job.output).decode([1, 0]) == job.tokenizer.decode([1, 0])


def test_what_a_run_writes(make_run: MakeRun) -> None:
    """Recipe, metrics, TensorBoard events and report agree with each other and with what the run told."""
    job, records = make_run("llama", training=Training(max_steps=5, warmup_steps=2)), list[StepRecord]()

    def on_step(record: StepRecord) -> None:
        assert not job.output.exists()
        records.append(record)

    report = run(job, on_step=on_step)
    assert not workplace_of(job.output).exists()
    assert not (job.output / "checkpoints").exists()
    assert Recipe.from_toml(job.output / "recipe.toml") == job.recipe
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in job.output.iterdir()), "a file that others cannot read"
    lines = metrics(job.output)
    assert [line["step"] for line in lines] == [record.step for record in records] == [1, 2, 3, 4, 5]
    events = EventAccumulator(str(job.output / "events")).Reload()
    assert set(events.Tags()["scalars"]) == KEYS - {"step"}
    for line in lines:
        assert line.keys() == KEYS
    for key in KEYS - {"step"}:
        told = [line[key] for line in lines]
        assert told == [getattr(record, key) for record in records]
        assert [event.value for event in events.Scalars(key)] == pytest.approx(told)
        assert [event.step for event in events.Scalars(key)] == [1, 2, 3, 4, 5]
    saved = json.loads((job.output / "report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    peak = saved["measured"]["peak"]["allocated_bytes"]
    assert peak == max(line["allocated_bytes"] for line in lines) == records[-1].peak_bytes
    assert sum(saved["measured"]["ledger"].values()) == peak
    assert saved["relative_error"]["allocated_bytes"] == (1000 - peak) / peak
    assert (saved["steps"], saved["first_loss"], saved["last_loss"]) == (5, lines[0]["loss"], lines[-1]["loss"])


@pytest.mark.parametrize("settings", [{}, {"memory": Memory(loss="chunked")}, {"method": "lora"}], ids=str)
def test_the_loss_falls(settings: dict[str, Any], make_run: MakeRun) -> None:
    """A text that repeats itself is learned: the loss falls by more than a fifth."""
    job = make_run(
        "llama", training=Training(max_steps=40), optimizer=Optimizer(learning_rate=2e-2, max_grad_norm=0.0), **settings
    )
    report = run(job)
    assert report.last_loss < report.first_loss * 0.8


def test_a_dropout_model_can_use_the_chunked_loss(make_run: MakeRun) -> None:
    """The check of the logits is not fooled by dropout (GPT-2 has it by default)."""
    run(make_run("gpt2", memory=Memory(loss="chunked"), training=Training(max_steps=1)))


def test_the_seed_decides(make_run: MakeRun, tmp_path: Path) -> None:
    """The same seed gives the same bits, another seed others."""
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        job = make_run("gpt2", output=tmp_path / str(number), training=Training(max_steps=2, seed=seed))
        run(job)
        weights.append(load_file(job.output / "model.safetensors")["transformer.wte.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_evaluation(make_run: MakeRun, tmp_path: Path) -> None:
    """Every N steps and at the end the loss on held data is transformers' own, and training goes as without it."""
    training = Training(max_steps=5, evaluate_every=2)
    job = make_run("gpt2", held=True, training=training)
    report = run(job)
    evaluated = {line["step"]: line["eval_loss"] for line in metrics(job.output) if "eval_loss" in line}
    assert list(evaluated) == [2, 4, 5]
    assert job.held is not None
    labels, inputs = job.held.labels.flatten(), job.held.input_ids
    logits = AutoModelForCausalLM.from_pretrained(job.output).eval()(inputs).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert evaluated[5] == pytest.approx(expected, rel=1e-5)
    assert report.evaluation == {"loss": evaluated[5], "perplexity": pytest.approx(math.exp(expected), rel=1e-4)}
    plain = make_run("gpt2", training=training, output=tmp_path / "plain")
    run(plain)
    assert (plain.output / "model.safetensors").read_bytes() == (job.output / "model.safetensors").read_bytes()
    assert all("eval_loss" not in line for line in metrics(plain.output))


def test_a_place_that_is_taken(make_run: MakeRun) -> None:
    """OUTPUT is never overwritten, nor is a directory that only happens to have the workplace's name."""
    job = make_run("llama")
    job.output.mkdir()
    with pytest.raises(UsageError, match="is there already"):
        run(job)
    job.output.rmdir()
    mine = workplace_of(job.output)
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="holds something else"):
        run(job)
    assert (mine / "thesis.tex").read_text() == "precious"


def test_no_room_from_the_start(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk too small for checkpoints and output is told before the first step."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    job = make_run("llama")
    with pytest.raises(DoesNotFitError, match=r"missing; free some") as caught:
        run(job)
    assert caught.value.exit_code == 3
    assert not workplace_of(job.output).exists()


def poisoned_after(step: int) -> Callable[..., torch.Tensor]:
    """The real step, but the weights hold a NaN after the given one."""
    count = 0

    def poisoned(workload: Workload, batches: Any, *, learning_rate: float) -> torch.Tensor:
        nonlocal count
        count += 1
        loss = train_step(workload, batches, learning_rate=learning_rate)
        if count == step:
            next(iter(workload.trainable.values())).data.view(-1)[0] = float("nan")
        return loss

    return poisoned


@pytest.mark.parametrize(
    ("poisoned", "every", "said"), [(2, 0, "the loss of step 3 is nan"), (2, 2, "after step 2"), (6, 0, "after step 6")]
)
def test_a_run_that_diverges(
    poisoned: int, every: int, said: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss or a weight that is no number ends the run, which names the step; no model or checkpoint has it."""
    monkeypatch.setattr(loop, "train_step", poisoned_after(poisoned))
    job = make_run("llama", training=Training(max_steps=6, save_every=every))
    with pytest.raises(UsageError, match=f"{said}.*diverged"):
        run(job)
    assert not job.output.exists()
    assert list(workplace_of(job.output).rglob("*.safetensors")) == []
    for line in (workplace_of(job.output) / "metrics.jsonl").read_text().splitlines():
        assert math.isfinite(json.loads(line, parse_constant=pytest.fail)["loss"])


def test_a_gradient_that_is_no_number_is_not_learned_from(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 stops the run and names its rows; what was learned before is kept, and from there the run ends as an
    undisturbed one, bit by bit."""
    whole, broken = (make_run("llama", output=tmp_path / name) for name in ("whole", "broken"))
    run(whole)
    count = 0

    def poisoned(workload: Workload, batches: Any, *, learning_rate: float) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 3:
            next(iter(workload.trainable.values())).register_hook(lambda gradient: gradient * math.nan)
        return train_step(workload, batches, learning_rate=learning_rate)

    rows = ", ".join(str(row + 1) for row in broken.data.step_rows(broken.recipe, 2))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", poisoned)
        with pytest.raises(UsageError, match=f"the loss of step 3 is nan, over rows {rows} of"):
            run(broken)
    run(replace(broken, resume=True))
    ours, theirs = (load_file(job.output / "model.safetensors") for job in (whole, broken))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_nan_weights(make_run: MakeRun, tmp_path: Path) -> None:
    """Weights with a NaN end the run in step 1 and leave nothing at all."""
    job = make_run("llama")
    broken = tmp_path / "broken"
    shutil.copytree(job.weights, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="the loss of step 1 is nan"):
        run(replace(job, weights=broken))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), RanOutOfMemoryError),
        (RuntimeError("CUDA out of memory. Tried to allocate"), RanOutOfMemoryError),
        (MemoryError(), RanOutOfMemoryError),
        (RecipeError("as it is"), RecipeError),
        (DoesNotFitError("a memory error, too, but of the disk"), DoesNotFitError),
        (RuntimeError("a bug"), RuntimeError),
    ],
    ids=str,
)
def test_out_of_memory(
    raised: Exception, expected: type[Exception], make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of memory is told with the ledger, exit 5; other errors stay what they are."""

    def fails(*_: Any, **__: Any) -> torch.Tensor:
        raise raised

    monkeypatch.setattr(loop, "train_step", fails)
    job = make_run("llama")
    with pytest.raises(expected) as caught:
        run(job)
    assert type(caught.value) is expected
    if expected is RanOutOfMemoryError:
        assert isinstance(caught.value, BrimError)
        assert caught.value.exit_code == 5
        assert "weights 600 B, optimizer 400 B" in str(caught.value)
    assert not workplace_of(job.output).exists()


def test_environment_names_versions() -> None:
    """A report says which versions its figures belong to."""
    found: Mapping[str, str] = environment()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found.keys() >= {"brim", "transformers", "peft", "python", "platform"}
