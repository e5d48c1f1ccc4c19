"""Generated text against a loop of arg max written here."""

from typing import Any

import pytest
import torch

from brim.errors import UsageError
from brim.inference import Loaded, generate

PROMPT = "Fill the cup"


def greedy(loaded: Loaded, prompt: str, count: int) -> list[int]:
    """The likeliest token each time, with no cache, until the end token."""
    source = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
    made: list[int] = []
    while len(made) < count and (not made or made[-1] != loaded.tokenizer.eos_token_id):
        with torch.no_grad():
            if loaded.is_seq2seq:
                logits = loaded.model(input_ids=source, decoder_input_ids=torch.tensor([[0, *made]])).logits
            else:
                logits = loaded.model(torch.cat([source, torch.tensor([made], dtype=torch.long)], dim=1)).logits
        made.append(int(logits[0, -1].argmax()))
    return made


def test_greedy_is_the_argmax_each_time(causal: Loaded) -> None:
    """Without a template, the text is the likeliest token after the prompt, again and again."""
    expected = greedy(causal, PROMPT, 24)
    made = generate(causal, PROMPT, max_tokens=24, chat=False)
    assert made.text == causal.tokenizer.decode(expected, skip_special_tokens=True)
    assert made.new_tokens == len(expected)
    assert made.prompt_tokens == len(PROMPT)


def test_encoder_decoder_generates_too(t5: Loaded) -> None:
    """A sequence-to-sequence model reads the prompt as its source."""
    expected = greedy(t5, PROMPT, 12)
    made = generate(t5, PROMPT, max_tokens=12, chat=False)
    assert made.text == t5.tokenizer.decode(expected, skip_special_tokens=True)
    assert made.new_tokens == len(expected)


def test_pieces_joined_are_the_text(causal: Loaded) -> None:
    """What was streamed is the text, in order, and came in more than one piece."""
    pieces: list[str] = []
    made = generate(causal, PROMPT, max_tokens=24, chat=False, listen=pieces.append)
    assert "".join(pieces) == made.text
    assert len(pieces) > 1
    assert all(pieces)


def test_letters_of_several_bytes_come_whole(llama: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece never holds half a letter: the bytes of one wait for each other."""
    text = "n\u00e4chste \u6a21\u578b \U0001f30a"
    ids = llama.tokenizer(text)["input_ids"]

    def speak(streamer: Any, **_: Any) -> None:
        streamer.put(torch.zeros(1, 3, dtype=torch.long))
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(llama.model, "generate", speak)
    pieces: list[str] = []
    made = generate(llama, PROMPT, max_tokens=80, chat=False, listen=pieces.append)
    assert pieces == list(text)
    assert made.text == text
    assert made.new_tokens == len(ids)


def test_chat_template_is_used_and_can_be_left_out(llama: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a template the model reads more than the prompt; without, just the prompt."""
    template = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} {% endfor %}[go]"
    monkeypatch.setattr(llama.tokenizer, "chat_template", template)
    assert generate(llama, PROMPT, max_tokens=1).prompt_tokens == len(f"[user] {PROMPT} [go]")
    assert generate(llama, PROMPT, max_tokens=1, chat=False).prompt_tokens == len(PROMPT)


def test_rates_follow_from_times(causal: Loaded) -> None:
    """Tokens per second are new tokens over seconds; after the first, one token and the prefill less."""
    made = generate(causal, PROMPT, max_tokens=10, chat=False)
    assert made.prefill_s > 0
    assert made.tokens_per_s == pytest.approx(made.new_tokens / (made.prefill_s + made.decode_s))
    assert made.decode_tokens_per_s == pytest.approx((made.new_tokens - 1) / made.decode_s)
    assert generate(causal, PROMPT, max_tokens=1, chat=False).decode_tokens_per_s is None


def test_resident_bytes_count_shared_weights_once(llama: Loaded) -> None:
    """The tied head and embedding are one storage; every other parameter is its own."""
    tensors = {name: tensor for name, tensor in llama.model.state_dict().items() if name != "lm_head.weight"}
    buffers = {name: tensor for name, tensor in llama.model.named_buffers() if name not in tensors}
    expected = sum(tensor.numel() * tensor.element_size() for tensor in (tensors | buffers).values())
    made = generate(llama, PROMPT, max_tokens=1, chat=False)
    assert made.resident_bytes == expected


def test_refusals_say_why(llama: Loaded) -> None:
    """An empty prompt, no tokens to make and a prompt that leaves no room are refused."""
    with pytest.raises(UsageError, match="prompt is empty"):
        generate(llama, "  ")
    with pytest.raises(UsageError, match="max_tokens 0"):
        generate(llama, PROMPT, max_tokens=0, chat=False)
    with pytest.raises(UsageError, match="12 tokens and 85 new ones pass the 96 positions"):
        generate(llama, PROMPT, max_tokens=85, chat=False)
