"""FLAN-T5's shape learns a task in BF16: by all its weights, and by adapters over the weights that learned another."""

import json
from collections.abc import Iterator
from dataclasses import replace
from math import log
from pathlib import Path

import torch
from torch import Tensor

from brim.models import ModelSpec
from brim.recipe import Lora, Memory, Optimizer, Recipe
from brim.training.batches import Batch
from brim.training.build import Workload, build
from brim.training.step import train_step

_LETTERS, _ROWS, _STEPS = 10, 16, 60
_FLOOR = log(_LETTERS) / 2
"""Nats a token of who does not read the source: of two tokens the second follows from the first."""
_CONFIG = {
    **json.loads((Path(__file__).parents[3] / "benchmarks" / "families.json").read_text(encoding="utf-8"))["flan-t5"],
    "vocab_size": 64, "dropout_rate": 0.0,
}  # fmt: skip
_SPEC = ModelSpec(name="flan-t5", kind="directory", config=_CONFIG, num_parameters=1, tied_head=False)
_FULL = Recipe(
    model="flan-t5", task="seq2seq-lm", seq_len=4, target_seq_len=2, micro_batch_size=_ROWS,
    optimizer=Optimizer(learning_rate=5e-3, rounding="stochastic"), memory=Memory(loss="chunked"),
)  # fmt: skip
_LORA = replace(_FULL, method="lora", optimizer=Optimizer(learning_rate=1e-2), lora=Lora(rank=8))


def tasks(word_of: Tensor) -> Iterator[Batch]:
    """Rows of one letter, four times over; to be answered by its two-token word."""
    while True:
        letters = torch.randint(0, _LETTERS, (_ROWS,))
        yield Batch(input_ids=(letters + 3)[:, None].expand(-1, 4), labels=word_of[letters], num_targets=2 * _ROWS)


def learned(workload: Workload, word_of: Tensor) -> tuple[float, float]:
    """Loss of the first step and the mean of the last ten."""
    rows, rate = tasks(word_of), workload.recipe.optimizer.learning_rate
    losses = [float(train_step(workload, [next(rows)], learning_rate=rate)) for _ in range(_STEPS)]
    return losses[0], sum(losses[-10:]) / 10


def words() -> Tensor:
    """Each letter's word: two tokens, the second of which follows from the first."""
    return torch.stack([torch.randperm(_LETTERS) + 20, torch.randperm(_LETTERS) + 40], dim=1)


def test_a_task_is_learned_by_all_weights_and_another_by_adapters(tmp_path: Path) -> None:
    """In BF16 the loss falls to under half of its start and below what can be had without reading the source."""
    torch.manual_seed(0)
    full = build(_FULL, _SPEC)
    assert {parameter.dtype for parameter in full.model.parameters()} == {torch.bfloat16}
    first, last = learned(full, words())
    assert last < first / 2 and last < _FLOOR
    full.base.save_pretrained(tmp_path)
    adapted = build(_LORA, _SPEC, weights=tmp_path)
    first, last = learned(adapted, words())
    assert last < first / 2 and last < _FLOOR
