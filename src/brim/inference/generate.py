"""Text from a model, piece by piece, with how fast it came."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from brim.errors import UsageError
from brim.inference.load import Loaded, resident_bytes

Listen = Callable[[str], None]
"""Called with each piece of text as soon as it is final; the pieces joined are the text."""


def listen_to_nothing(piece: str) -> None:
    """Drops the pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A generated text and what it took."""

    text: str
    prompt_tokens: int
    """Tokens that the model read first, its chat template's included."""
    new_tokens: int
    prefill_s: float
    """From the call to the first new token."""
    decode_s: float
    """From the first new token to the last."""
    resident_bytes: int
    """Bytes of the model's weights and buffers while it ran."""

    @property
    def tokens_per_s(self) -> float:
        """New tokens over the whole time, prefill included."""
        return self.new_tokens / (self.prefill_s + self.decode_s)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Speed after the first token; None where there was but one."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "tokens_per_s": self.tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "resident_bytes": self.resident_bytes,
        }


def generate(
    loaded: Loaded, prompt: str, *, max_tokens: int = 128, chat: bool = True, listen: Listen = listen_to_nothing
) -> Generation:
    """Up to `max_tokens` tokens that follow `prompt`, the likeliest each time (greedy, so the same every time).

    `chat` wraps the prompt in the tokenizer's chat template where it has one. Raises UsageError for an empty prompt
    and for one that leaves the model no room.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty; write what the text should go on from")
    inputs = _inputs(loaded, prompt, chat=chat).to(loaded.model.device)
    prompt_tokens = int(inputs["input_ids"].shape[-1])
    _check_room(loaded, prompt_tokens, max_tokens)
    pieces = _Pieces(loaded.tokenizer, listen)
    eos = loaded.tokenizer.eos_token_id
    pad = loaded.tokenizer.pad_token_id
    write(
        loaded.model,
        {**inputs, "pad_token_id": eos if pad is None else pad, "streamer": pieces},
        max_tokens=max_tokens,
    )
    return Generation(
        text=pieces.text,
        prompt_tokens=prompt_tokens,
        new_tokens=len(pieces.times),
        prefill_s=pieces.times[0] - pieces.started,
        decode_s=pieces.times[-1] - pieces.times[0],
        resident_bytes=resident_bytes(loaded.model),
    )


def write(model: Any, settings: Mapping[str, Any], *, max_tokens: int) -> Any:
    """Tokens after a prompt, the likeliest each time, by transformers' own loop and cache; real runs and rehearsals.

    `settings`: the prompt's tensors, and what else transformers' `generate` is to know.
    """
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return model.generate(**settings, **greedy, max_new_tokens=max_tokens)


def _inputs(loaded: Loaded, prompt: str, *, chat: bool) -> Any:
    if chat and loaded.tokenizer.chat_template:
        return loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return loaded.tokenizer(prompt, return_tensors="pt")


def _check_room(loaded: Loaded, prompt_tokens: int, max_tokens: int) -> None:
    if max_tokens < 1:
        raise UsageError(f"max_tokens {max_tokens} is less than 1")
    limit = loaded.max_positions
    needed = prompt_tokens if loaded.is_seq2seq else prompt_tokens + max_tokens
    if limit and needed > limit:
        raise UsageError(
            f"the prompt's {prompt_tokens} tokens and {max_tokens} new ones pass the {limit} positions of the model; "
            f"shorten the prompt or ask for fewer tokens (--max-tokens)"
        )


class _Pieces(BaseStreamer):  # type: ignore[misc]
    """Hands text on as it becomes final and keeps the time of each new token.

    transformers' own TextStreamer decodes each line by itself, and tokenizers that drop a leading space then lose it;
    here the whole text is decoded each time and what is new in it handed on.
    """

    def __init__(self, tokenizer: Any, listen: Listen) -> None:
        self.tokenizer = tokenizer
        self.listen = listen
        self.text = ""
        self.token_ids: list[int] = []
        self.times: list[float] = []
        self.started = time.perf_counter()
        self._read_prompt = False

    def put(self, value: Tensor) -> None:
        # The first call brings the prompt (or the decoder's start), each later one a new token.
        if self._read_prompt:
            self.times.append(time.perf_counter())
            self.token_ids += value.flatten().tolist()
            self._hand_on(final=False)
        self._read_prompt = True

    def end(self) -> None:
        self._hand_on(final=True)

    def _hand_on(self, *, final: bool) -> None:
        decode = self.tokenizer.decode
        text = decode(self.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # The replacement character at the end is most often a letter of which some bytes are still to come.
        if (final or not text.endswith("\ufffd")) and len(text) > len(self.text):
            self.listen(text[len(self.text) :])
            self.text = text
