"""Masked-token and classification targets: what is learned, from rows of text to the loss."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from brim.errors import DataError, RecipeError, UsageError
from brim.inference.load import load
from brim.layers.chunked_loss import IGNORED
from brim.models import ModelSpec, describe
from brim.recipe import Precision, Recipe
from brim.training.batches import synthetic_batch
from brim.training.build import build
from brim.training.data import tokenize
from brim.training.layouts import Row
from brim.training.masking import Masking
from brim.training.rows import read_rows
from brim.training.step import train_step

_WORDS = [f"w{number}" for number in range(60)]
_BERT: dict[str, Any] = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 64, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_SPEC = ModelSpec(name="tiny-bert", kind="directory", config=_BERT, num_parameters=1, tied_head=True)
_FP32 = Precision(weights="fp32", compute="fp32")
_MASKED = Recipe(model="tiny-bert", task="masked-lm", seq_len=20, micro_batch_size=3, precision=_FP32)
_CLASSES = Recipe(
    model="tiny-bert", task="sequence-classification", num_labels=3, seq_len=8, micro_batch_size=4, precision=_FP32
)


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: index for index, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "[MASK]", *_WORDS])}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="[PAD]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )


def texts(count: int) -> list[Row]:
    return [Row("", " ".join(_WORDS[index % 60 : index % 60 + 9] or _WORDS[:9])) for index in range(count)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), length=st.integers(8, 64))
def test_masking_hides_15_percent_and_remembers_them(seed: int, length: int) -> None:
    """Each row hides 15 % of its tokens, none of them special; labels are what stood there, the rest is untouched."""
    masking = Masking(mask_id=3, special_ids=frozenset({0, 1, 2, 3}), vocab_size=64)
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(4, 64, (4, length), generator=generator)
    ids_BT[:, 0] = 1
    seen_BT, labels_BT = masking(ids_BT, generator)
    chosen_BT = labels_BT != IGNORED
    assert (chosen_BT.sum(dim=1) == max(1, round(0.15 * length))).all()
    assert not chosen_BT[:, 0].any()
    assert torch.equal(labels_BT[chosen_BT], ids_BT[chosen_BT])
    assert torch.equal(seen_BT[~chosen_BT], ids_BT[~chosen_BT])


def test_hidden_tokens_are_shown_as_bert_showed_them() -> None:
    """Of the chosen tokens 80 % become the mask token, about 10 % another token, the rest stay."""
    masking = Masking(mask_id=3, special_ids=frozenset({0, 1, 2, 3}), vocab_size=10_000)
    ids_BT = torch.randint(4, 10_000, (50, 2000), generator=torch.Generator().manual_seed(0))
    seen_BT, labels_BT = masking(ids_BT, torch.Generator().manual_seed(1))
    chosen_BT = labels_BT != IGNORED
    shown, was = seen_BT[chosen_BT], ids_BT[chosen_BT]
    assert (shown == 3).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert (shown == was).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_masks_are_a_function_of_seed_and_step() -> None:
    """The same step masks the same tokens; another step or seed masks others. No batch needs a padding mask."""
    data = tokenize(texts(40), tokenizer(), _MASKED)
    first, again, later = (data.step_batches(_MASKED, step)[0] for step in (0, 0, 1))
    other = data.step_batches(_MASKED.with_settings(["training.seed=1"]), 0)[0]
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, later.labels)
    assert not torch.equal(first.labels, other.labels)
    assert first.attention_mask is None
    assert first.num_targets == (first.labels != IGNORED).sum()


def test_masked_loss_is_transformers_own() -> None:
    """The masked-lm loss of a step equals that of the model class itself on the same batch."""
    data = tokenize(texts(12), tokenizer(), _MASKED)
    batch = data.step_batches(_MASKED, 0)[0]
    workload = build(_MASKED, _SPEC)
    with torch.no_grad():
        expected = workload.model(input_ids=batch.input_ids, labels=batch.labels).loss
    assert train_step(workload, [batch], learning_rate=1e-3).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_classification_loss_is_transformers_own_and_falls(method: str) -> None:
    """The loss equals the model class's; training on one batch brings it down; an adapter trains the new head too."""
    recipe = _CLASSES.with_settings([f"method={method}"])
    workload = build(recipe, _SPEC)
    batch = synthetic_batch(recipe, _SPEC)
    with torch.no_grad():
        expected = workload.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
    losses = [train_step(workload, [batch], learning_rate=1e-2).item() for _ in range(20)]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[-1] < losses[0] / 2
    assert any("classifier" in name for name in workload.trainable)


def test_labels_are_numbers_or_names(tmp_path: Path) -> None:
    """Numbers stand for themselves, names are numbered by the alphabet; each row keeps its own, padded and masked."""
    path = tmp_path / "rows.jsonl"
    for given_labels, numbers in (([2, 0, 0, 1], [2, 0, 0, 1]), (["good", "bad", "bad", "so-so"], [1, 0, 0, 2])):
        lines = [{"text": f"w{index} w1", "label": label} for index, label in enumerate(given_labels)]
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        data = tokenize(read_rows(path), tokenizer(), _CLASSES)
        assert data.labels.tolist() == numbers
        assert data.input_ids.shape == (4, 8)
        assert data.attention_mask is not None
        assert data.attention_mask.sum(dim=1).tolist() == [4, 4, 4, 4]


def test_labels_that_cannot_be_learned_are_named() -> None:
    """More classes than the recipe has, or a row without one, is refused with what to do."""
    many = [Row("", "w1", label) for label in ("a", "b", "c", "d")]
    with pytest.raises(DataError, match="num_labels = 4"):
        tokenize(many, tokenizer(), _CLASSES)
    with pytest.raises(DataError, match='needs a "label"'):
        tokenize(texts(2), tokenizer(), _CLASSES)


def test_heads_that_do_not_go_with_a_model_are_refused() -> None:
    """BERT writes no text; what it can be trained for is named."""
    with pytest.raises(RecipeError, match='nearest: task = "masked-lm"'):
        build(Recipe(model="tiny-bert", task="causal-lm", seq_len=8), _SPEC)


def test_an_encoder_is_not_asked_for_text(tmp_path: Path) -> None:
    """A masked-lm model is refused where text is written or scored: it sees the words that it would have to guess."""
    build(_MASKED, _SPEC).base.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="fills in masked tokens"):
        load(tmp_path)


def test_a_classifier_is_described_as_one(tmp_path: Path) -> None:
    """A saved classifier says its task and number of classes, and is built with its own head's weights."""
    saved = build(_CLASSES, _SPEC).base
    saved.save_pretrained(tmp_path)
    spec = describe(str(tmp_path))
    assert (spec.task, spec.num_labels) == ("sequence-classification", 3)
    loaded = build(_CLASSES, spec, weights=tmp_path).base
    assert torch.equal(loaded.get_submodule("classifier").weight, saved.get_submodule("classifier").weight)
