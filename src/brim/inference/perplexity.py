"""Perplexity over a text by a sliding window: exp of the mean negative log-likelihood of its tokens.

A window moves over the tokens by `stride`. Each token is scored once, in the first window that reaches it, and so with
at least `window - stride` tokens before it (those of the first window have fewer). Windows that do not overlap would
score their first tokens with next to no context and come out higher. The text's very first token has nothing before
it and is not scored.
"""

import inspect
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brim import units
from brim.errors import DataError, ModelFileError, UsageError
from brim.inference.load import Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """How surprised a model is by a text, with what the figure depends on."""

    value: float
    num_tokens: int
    """Tokens scored."""
    window: int
    """Most tokens that the model sees at once."""
    stride: int
    """Tokens that the window moves by: a token is scored with at least `window - stride` before it."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "perplexity": self.value,
            "tokens": self.num_tokens,
            "window": self.window,
            "stride": self.stride,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One window over the tokens: `begin` to `end` are read, of these `score_from` to `end` scored."""

    begin: int
    score_from: int
    end: int


def spans(num_tokens: int, *, window: int, stride: int) -> list[Span]:
    """Windows that together score each of the tokens 1 to `num_tokens - 1` exactly once."""
    found = [Span(begin=0, score_from=1, end=min(window, num_tokens))]
    while found[-1].end < num_tokens:
        last = found[-1]
        begin = last.begin + stride
        found.append(Span(begin=begin, score_from=last.end, end=min(begin + window, num_tokens)))
    return found


@torch.inference_mode()
def perplexity(
    loaded: Loaded,
    text: str,
    *,
    window: int = 512,
    stride: int = 256,
    max_tokens: int | None = None,
    batch_size: int = 1,
    progress: units.Progress = units.no_progress,
) -> Perplexity:
    """The text's perplexity under a causal model, mean over tokens; `max_tokens` reads the text's beginning only.

    `progress` counts scored tokens. Raises UsageError for an encoder-decoder model or a window that does not suit,
    DataError for a text of fewer than two tokens, ModelFileError where the model's outputs are not numbers.
    """
    _check(loaded, window=window, stride=stride)
    started = time.perf_counter()
    tokens = _tokens(loaded, text)[:max_tokens]
    if len(tokens) < 2:
        raise DataError(f"the text has {len(tokens)} tokens; perplexity needs at least two")
    total_nats, scored = 0.0, 0
    for batch in _batches(spans(len(tokens), window=window, stride=stride), batch_size):
        total_nats += _batch_nats(loaded.model, tokens, batch)
        scored += sum(span.end - span.score_from for span in batch)
        progress(scored, len(tokens) - 1)
    if not math.isfinite(total_nats):
        raise ModelFileError("the model's outputs are not numbers (Inf or NaN): its weights are damaged or overflow")
    return Perplexity(
        value=math.exp(total_nats / scored),
        num_tokens=scored,
        window=window,
        stride=stride,
        seconds=time.perf_counter() - started,
    )


def _check(loaded: Loaded, *, window: int, stride: int) -> None:
    if loaded.is_seq2seq:
        raise UsageError(
            f"perplexity of a running text is not defined for {loaded.model.config.model_type}, an encoder-decoder "
            "model: it scores a target given a source; name a causal model"
        )
    if not 1 <= stride < window:
        raise UsageError(f"stride {stride} does not suit window {window}: it must be from 1 to {window - 1}")
    if (limit := loaded.max_positions) and window > limit:
        raise UsageError(f"window {window} is more than the {limit} positions of the model; use --window {limit}")


def _tokens(loaded: Loaded, text: str) -> Tensor:
    # verbose=False: the tokenizer would warn that the text is longer than the model, which the window is for.
    ids = loaded.tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long, device=loaded.model.device)


def _batches(windows: list[Span], batch_size: int) -> list[list[Span]]:
    """Runs of up to `batch_size` windows that read and score alike, so that they stack without padding."""
    batches: list[list[Span]] = []
    for span in windows:
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and _shape(last[0]) == _shape(span):
            last.append(span)
        else:
            batches.append([span])
    return batches


def _shape(span: Span) -> tuple[int, int]:
    return span.end - span.begin, span.end - span.score_from


def _batch_nats(model: Any, tokens: Tensor, batch: list[Span]) -> float:
    """Sum of -ln p over the scored tokens of these windows.

    Shapes: B windows, T tokens read, S tokens scored, V vocabulary.
    """
    num_scored = _shape(batch[0])[1]
    input_BT = torch.stack([tokens[span.begin : span.end] for span in batch])
    logits_BSV = _last_logits(model, input_BT, num_scored + 1)[:, :-1]
    target_BS = input_BT[:, -num_scored:]
    # fp32: a softmax over 49,152 numbers in bf16 would be off in the second digit.
    nats = torch.nn.functional.cross_entropy(logits_BSV.float().flatten(0, 1), target_BS.flatten(), reduction="sum")
    return float(nats)


def _last_logits(model: Any, input_BT: Tensor, count: int) -> Tensor:
    """Logits at the last `count` positions; the others are not computed where the model can leave them out."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_BT, use_cache=False, logits_to_keep=count).logits
    return model(input_BT, use_cache=False).logits[:, -count:]
