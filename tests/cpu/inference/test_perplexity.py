"""Perplexity against a brute force that scores one token at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.errors import DataError, ModelFileError, UsageError
from brim.inference import Loaded, perplexity
from brim.inference.perplexity import spans

TEXT = "The brim of the hat was wet; the cup was filled to the brim, and not one drop went over it. " * 3


def one_by_one(loaded: Loaded, text: str, *, window: int, stride: int) -> float:
    """Perplexity with a forward pass for each token, over just the tokens that its window shows before it."""
    ids = loaded.tokenizer(text)["input_ids"]
    total = 0.0
    for position in range(1, len(ids)):
        first_window_that_reaches_it = max(0, math.ceil((position + 1 - window) / stride))
        begin = first_window_that_reaches_it * stride
        with torch.no_grad():
            logits = loaded.model(torch.tensor([ids[begin:position]])).logits[0, -1]
        total -= float(logits.double().log_softmax(0)[ids[position]])
    return math.exp(total / (len(ids) - 1))


def test_whole_text_in_one_window(causal: Loaded) -> None:
    """Where the window holds the text, each token is scored with all that comes before it."""
    text = TEXT[:80]
    found = perplexity(causal, text, window=96, stride=48)
    assert found.value == pytest.approx(one_by_one(causal, text, window=96, stride=48), rel=1e-5)
    assert found.num_tokens == 79


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 31), (17, 5), (2, 1)])
def test_sliding_window(causal: Loaded, window: int, stride: int) -> None:
    """Each token is scored once, in the first window that reaches it."""
    text = TEXT[:150]
    found = perplexity(causal, text, window=window, stride=stride)
    assert found.value == pytest.approx(one_by_one(causal, text, window=window, stride=stride), rel=1e-5)
    assert (found.num_tokens, found.window, found.stride) == (149, window, stride)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_batches_change_nothing(llama: Loaded, batch_size: int) -> None:
    """Windows scored together give what they give alone."""
    alone = perplexity(llama, TEXT, window=32, stride=16)
    together = perplexity(llama, TEXT, window=32, stride=16, batch_size=batch_size)
    assert together.value == pytest.approx(alone.value, rel=1e-6)
    assert together.num_tokens == alone.num_tokens


def test_max_tokens_reads_the_beginning(llama: Loaded) -> None:
    """`max_tokens` gives the perplexity of the text cut there (one token is one byte here)."""
    cut = perplexity(llama, TEXT, window=32, stride=16, max_tokens=50)
    assert cut.value == perplexity(llama, TEXT[:50], window=32, stride=16).value
    assert cut.num_tokens == 49


@given(st.integers(2, 400), st.integers(2, 64), st.data())
@settings(max_examples=200)
def test_spans_score_each_token_once_with_its_context(num_tokens: int, window: int, data: st.DataObject) -> None:
    """Spans cover tokens 1 to N-1 once, read no more than the window, and keep `window - stride` before each."""
    stride = data.draw(st.integers(1, window - 1))
    found = spans(num_tokens, window=window, stride=stride)
    scored = [token for span in found for token in range(span.score_from, span.end)]
    assert scored == list(range(1, num_tokens))
    assert all(span.end - span.begin <= window for span in found)
    assert all(span.score_from - span.begin >= window - stride for span in found[1:])


def test_progress_ends_at_the_total(llama: Loaded) -> None:
    """Progress counts scored tokens, rising to all of them."""
    heard: list[tuple[int, int]] = []
    found = perplexity(llama, TEXT, window=32, stride=16, progress=lambda done, total: heard.append((done, total)))
    assert heard == sorted(heard)
    assert heard[-1] == (found.num_tokens, found.num_tokens)


def test_refusals_say_why(llama: Loaded, t5: Loaded) -> None:
    """An encoder-decoder model, a window or stride that does not suit and a text too short are refused by name."""
    with pytest.raises(UsageError, match="t5, an encoder-decoder"):
        perplexity(t5, TEXT)
    with pytest.raises(UsageError, match=r"window 97 is more than the 96 positions.*--window 96"):
        perplexity(llama, TEXT, window=97, stride=48)
    for stride in (0, 32):
        with pytest.raises(UsageError, match=f"stride {stride} does not suit window 32: it must be from 1 to 31"):
            perplexity(llama, TEXT, window=32, stride=stride)
    with pytest.raises(DataError, match="1 tokens"):
        perplexity(llama, "a", window=32, stride=16)


def test_outputs_that_are_no_numbers_are_refused(llama: Loaded) -> None:
    """A model that gives NaN has no perplexity; the result is an error, not NaN in a report."""
    weight = llama.model.model.norm.weight
    kept = weight.data.clone()
    weight.data.fill_(math.nan)
    try:
        with pytest.raises(ModelFileError, match="not numbers"):
            perplexity(llama, TEXT, window=32, stride=16)
    finally:
        weight.data.copy_(kept)
