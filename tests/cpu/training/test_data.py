"""Rows to batches: nothing is lost, each label is what comes next, and the order is the seed's."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM

from brim.errors import DataError
from brim.layers.chunked_loss import IGNORED
from brim.models import describe
from brim.recipe import Parallel, Recipe, Training
from brim.training.build import Workload
from brim.training.data import tokenize
from brim.training.dataset import DataSet
from brim.training.layouts import Row
from brim.training.step import batch_loss

MakeRecipe = Callable[..., Recipe]
MakeWorkload = Callable[[Recipe], Workload]
TEXTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1, max_size=6)


def causal(**settings: Any) -> Recipe:
    return replace(Recipe(model="any", seq_len=8, micro_batch_size=2), **settings)


def seq2seq(source: int = 12, target: int = 6) -> Recipe:
    return Recipe(model="any", task="seq2seq-lm", seq_len=source, target_seq_len=target, micro_batch_size=2)


@given(texts=TEXTS, length=st.integers(2, 20))
def test_blocks_lose_nothing(tokenizer: Any, texts: list[str], length: int) -> None:
    """Blocks one after another are the texts, an end token after each; each label is the token after its input."""
    data = tokenize([Row("", text) for text in texts], tokenizer, causal(seq_len=length))
    labels, inputs = data.labels.flatten(), data.input_ids.flatten()
    count = int((data.labels != -100).sum())
    stream = [int(inputs[0]), *labels[:count].tolist()]
    assert tokenizer.decode(stream) == "".join(text + tokenizer.eos_token for text in texts)
    assert inputs[:count].tolist() == stream[:-1]
    assert (labels[count:] == IGNORED).all()
    assert len(labels) - count < length
    assert data.input_ids.shape[1] == length


def test_a_start_token_is_kept(tokenizer: Any) -> None:
    """A tokenizer that begins each text with a mark does so in training as at inference, and ends are not doubled."""
    marked = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    )
    marked.eos_token = tokenizer.eos_token
    marks = {"single": "A $0 <end>", "special_tokens": [("A", marked.convert_tokens_to_ids("A")), ("<end>", 0)]}
    marked.backend_tokenizer.post_processor = TemplateProcessing(**marks)
    data = tokenize([Row("", "xy"), Row("", "z")], marked, causal())
    assert marked.decode([int(data.input_ids[0, 0]), *data.labels[data.labels != -100].tolist()]) == "Axy<end>Az<end>"


def test_too_little_to_learn(tokenizer: Any) -> None:
    """One token has no next one."""
    endless = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no next token"):
        tokenize([Row("", "a")], endless, causal())


def rows_of(data: DataSet, recipe: Recipe, steps: int) -> list[tuple[int, ...]]:
    batches = [batch for step in range(steps) for batch in data.step_batches(recipe, step)]
    assert all(len(batch.input_ids) == recipe.micro_batch_size for batch in batches)
    return [tuple(row) for batch in batches for row in batch.input_ids.tolist()]


@given(count=st.integers(1, 13), micro=st.integers(1, 4), accumulated=st.integers(1, 3), seed=st.integers(0, 2**39))
def test_each_epoch_is_a_permutation(count: int, micro: int, accumulated: int, seed: int) -> None:
    """Every epoch has each row once, in an order that the seed alone decides; `steps` covers the epochs whole."""
    ids = torch.arange(count).view(-1, 1)
    data = DataSet(input_ids=ids, labels=ids, attention_mask=None)
    recipe = causal(
        micro_batch_size=micro, grad_accumulation=accumulated, training=Training(epochs=2, seed=seed)
    )  # fmt: skip
    steps = data.steps(recipe)
    seen = rows_of(data, recipe, steps)
    assert seen == rows_of(data, recipe, steps)
    for epoch in range(2):
        part = seen[epoch * count : (epoch + 1) * count]
        assert Counter(part) == Counter((row,) for row in range(count))
    assert len(seen) - 2 * count < micro * accumulated
    assert data.steps(replace(recipe, training=Training(max_steps=5))) == 5


@given(count=st.integers(1, 30), micro=st.integers(1, 3), accumulated=st.integers(1, 3), ranks=st.integers(1, 4))
def test_steps_read_the_same_rows_whatever_the_ranks(count: int, micro: int, accumulated: int, ranks: int) -> None:
    """Several ranks read together, in each step, what one reads in as many micro-batches."""
    rows = torch.arange(count).unsqueeze(1).expand(-1, 2)
    data = DataSet(input_ids=rows, labels=rows)
    alone = causal(seq_len=2, micro_batch_size=micro, grad_accumulation=accumulated * ranks)
    together = replace(alone, grad_accumulation=accumulated, parallel=Parallel(devices_per_node=ranks, sharding="ddp"))
    for step in range(3):
        one = [batch.input_ids[:, 0].tolist() for batch in data.step_batches(alone, step)]
        shares = [data.step_batches(together, step, data_rank=rank) for rank in range(ranks)]
        assert one == [batch.input_ids[:, 0].tolist() for turn in zip(*shares, strict=True) for batch in turn]


def test_the_seed_changes_the_order() -> None:
    """Another seed and another epoch give another order."""
    ids = torch.arange(50).view(-1, 1)
    data = DataSet(input_ids=ids, labels=ids, attention_mask=None)
    orders = [rows_of(data, causal(training=Training(seed=seed)), 50) for seed in (0, 1)]
    assert orders[0][:50] != orders[1][:50]
    assert orders[0][:50] != orders[0][50:]


def test_in_order_has_each_row_once(tokenizer: Any) -> None:
    """Evaluation reads the rows as they are, each once, and counts each target."""
    data = tokenize([Row("", "abcdefghij" * 5)], tokenizer, causal())
    batches = list(data.in_order(3))
    assert torch.equal(torch.cat([batch.input_ids for batch in batches]), data.input_ids)
    assert sum(batch.num_targets for batch in batches) == 50


def test_fingerprint_tells_data_apart(tokenizer: Any) -> None:
    """The same text has the same fingerprint, another text or shape another."""
    first, again, other, shape = (
        tokenize([Row("", text)], tokenizer, causal(seq_len=length)).fingerprint
        for text, length in (("abcd", 4), ("abcd", 4), ("abce", 4), ("abcd", 2))
    )
    assert first == again
    assert len({first, other, shape}) == 3


@given(pairs=st.lists(st.tuples(st.text("ab", min_size=1, max_size=20), st.text("xy", min_size=1, max_size=9))))
def test_pairs(tokenizer: Any, pairs: list[tuple[str, str]]) -> None:
    """Sources are cut or padded, with a mask; targets too, always with an end token, and padding has no label."""
    if not pairs:
        return
    data = tokenize([Row(source, target) for source, target in pairs], tokenizer, seq2seq())
    assert data.attention_mask is not None
    for index, (source, target) in enumerate(pairs):
        length = int(data.attention_mask[index].sum())
        assert tokenizer.decode(data.input_ids[index, :length]) == source[:12]
        labels = data.labels[index]
        assert tokenizer.decode(labels[labels != IGNORED]) == target[:5] + tokenizer.eos_token
        assert (labels[len(target[:5]) + 1 :] == IGNORED).all()


def test_pairs_need_a_source(tokenizer: Any) -> None:
    """Plain text is no sequence-to-sequence data."""
    with pytest.raises(DataError, match="needs a source and a target"):
        tokenize([Row("a", "b"), Row("", "b")], tokenizer, seq2seq())


def test_t5_learns_what_transformers_would(
    tokenizer: Any, tiny_directory: Callable[[str], Path], make_workload: MakeWorkload
) -> None:
    """The loss of a T5 batch is transformers' own from labels alone, its decoder inputs shifted by itself."""
    source = str(tiny_directory("t5"))
    recipe = replace(seq2seq(), model=source, precision=replace(seq2seq().precision, weights="fp32", compute="fp32"))
    data = tokenize([Row("aab", "x"), Row("b" * 30, "xyxyxyxyxy")], tokenizer, recipe)
    (batch,) = data.in_order(2)
    workload = make_workload(recipe)
    workload.model.eval()
    model = AutoModelForSeq2SeqLM.from_pretrained(source).eval()
    assert describe(source).task == "seq2seq-lm"
    loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(batch_loss(workload, batch, batch.num_targets), loss, rtol=1e-5, atol=0)
