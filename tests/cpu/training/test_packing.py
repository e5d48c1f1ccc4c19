"""Packed rows against each example alone."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from brim.errors import DataError, RecipeError
from brim.models import describe
from brim.recipe import Memory, Optimizer, Recipe, Training
from brim.training.batches import Batch
from brim.training.build import Workload, build
from brim.training.data import tokenize
from brim.training.examples import Example
from brim.training.job import Run
from brim.training.layouts import Row
from brim.training.loop import run
from brim.training.packing import check_apart, fill_rows, pack
from brim.training.step import batch_loss

MakeRecipe = Callable[..., Recipe]
MakeWorkload = Callable[[Recipe], Workload]
PACKED = Training(packing=True, max_steps=3)
TEXTS = ["Filled to the brim", "and", "never over it.", "It", "measures twice, predicts once, and says by how much."]


@given(lengths=st.lists(st.integers(1, 12), max_size=40))
def test_rows_hold_each_example_once(lengths: list[int]) -> None:
    """No row is overfull, each example is in one row, and no two rows would go into one."""
    rows = fill_rows(lengths, 12)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[index] for index in row) for row in rows)
    assert all(0 < length <= 12 for length in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > 12


@given(wanted=st.lists(st.lists(st.booleans(), min_size=2, max_size=30), min_size=1, max_size=12))
def test_every_token_is_learned_once(wanted: list[list[bool]]) -> None:
    """Packed rows hold each example's next-token pairs that are to be learned once, also of those that are cut, with
    their positions and their example's number."""
    examples = [
        Example([100 * index + place for place in range(len(learned))], learned) for index, learned in enumerate(wanted)
    ]
    if not any(any(learned[1:]) for learned in wanted):
        return
    packed = pack(examples, 8, padding=-1)
    inputs, labels, positions = packed.input_ids, packed.labels, packed.position_ids
    assert inputs.shape == labels.shape == positions.shape and inputs.shape[1] == 8
    known, filled = labels != -100, inputs != -1
    pairs = sorted(zip(inputs[known].tolist(), labels[known].tolist(), strict=True))
    assert pairs == sorted(
        pair
        for example in examples
        for pair, taught in zip(pairwise(example.ids), example.learned[1:], strict=True)
        if taught
    )
    assert torch.equal(positions[filled], inputs[filled] % 100 % 8)
    assert (labels[~filled] == -100).all()
    for row, origin in zip(inputs, packed.origins, strict=True):
        assert {int(token) // 100 for token in row if token >= 0} == set(origin)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "granite"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_packed_examples_are_learned_as_alone(
    family: str,
    attention: Literal["sdpa", "eager", "flash"],
    loss: Literal["full", "chunked"],
    make_recipe: MakeRecipe,
    make_workload: MakeWorkload,
    tokenizer: Any,
) -> None:
    """Loss and gradients of a packed row are the sums over its examples, each alone in its own row."""
    recipe = make_recipe(family, memory=Memory(attention=attention, loss=loss), seq_len=96, training=PACKED)
    workload = make_workload(recipe)
    workload.model.eval()  # dropout apart
    data = tokenize([Row("", text) for text in TEXTS], tokenizer, recipe)
    assert len(data) == 1
    (batch,) = data.in_order(1)
    with workload.kernels():
        packed = batch_loss(workload, batch, batch.num_targets)
        packed.backward()
        gradients = {name: p.grad.clone() for name, p in workload.trainable.items() if p.grad is not None}
        workload.model.zero_grad()
        total = 0.0
        for text in TEXTS:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            alone = Batch(input_ids=ids[:, :-1], labels=ids[:, 1:], num_targets=ids.shape[1] - 1)
            share = batch_loss(workload, alone, batch.num_targets)
            share.backward()
            total += float(share.detach())
    assert float(packed.detach()) == pytest.approx(total, rel=1e-5)
    for name, parameter in workload.trainable.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_packed_run(make_run: Callable[..., Run]) -> None:
    """A run over packed rows ends with a model, and its losses are numbers that fall."""
    report = run(make_run("llama", training=replace(PACKED, max_steps=6), optimizer=Optimizer(learning_rate=1e-2)))
    assert report.last_loss < report.first_loss


def test_a_model_that_takes_no_positions_is_refused(
    make_recipe: MakeRecipe, tiny_directory: Callable[[str], Path]
) -> None:
    """State-space models and others without positions cannot be told where an example begins."""
    config = {"model_type": "mamba2", "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 16,
              "expand": 2, "n_groups": 1, "state_size": 16, "vocab_size": 99}  # fmt: skip
    spec = replace(describe(str(tiny_directory("llama"))), config=config)
    with pytest.raises(RecipeError, match=r"takes no positions.*nearest: training\.packing = false"):
        build(Recipe(model="mamba", training=PACKED, memory=Memory(attention="eager")), spec)


class SeesAll(nn.Module):
    """Logits of the token, and of all before it in the row."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> Any:
        return type("Out", (), {"logits": input_ids.float().cumsum(-1)[..., None]})


def test_a_model_that_looks_across_is_refused() -> None:
    """A model that takes positions and still lets examples see each other is found out before the first step."""
    with pytest.raises(RecipeError, match="sees those before it"):
        check_apart(SeesAll(), {"input_ids": torch.arange(8)[None]})


def test_nothing_to_learn(make_recipe: MakeRecipe, tokenizer: Any) -> None:
    """Data without a next token is refused."""
    with pytest.raises(DataError, match="two tokens"):
        tokenize([Row("", "")], tokenizer, make_recipe("llama", training=PACKED))
