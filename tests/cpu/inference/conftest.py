"""Tiny random models with a tokenizer of bytes: real classes, a millisecond a step."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from brim.inference import Loaded

END = "<end>"


def byte_tokenizer() -> Any:
    """One token a byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={END: 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)


VOCAB = 257
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=96, bos_token_id=0, eos_token_id=0,
    ),
    "llama": LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    ),
    "t5": T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip


def tiny(family: str) -> Loaded:
    """A random model of this family, the same every time."""
    config = CONFIGS[family]
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config)
        for parameter in model.parameters():
            # Wider than the usual start, so that what comes before a token matters to it.
            torch.nn.init.normal_(parameter, std=0.3)
    return Loaded(model.eval(), byte_tokenizer())


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def causal(request: pytest.FixtureRequest) -> Loaded:
    return tiny(request.param)


@pytest.fixture(scope="session")
def llama() -> Loaded:
    return tiny("llama")


@pytest.fixture(scope="session")
def t5() -> Loaded:
    return tiny("t5")
