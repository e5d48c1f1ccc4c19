"""For tests that need torch: one thread each, and tiny random models with a tokenizer of bytes.

Tiny models are faster on one thread than on several that wait for each other, and pytest-xdist fills the other cores.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

torch.set_num_threads(1)

END = "<end>"
VOCAB = 257
_LLAMA_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_GEMMA_SHAPE: dict[str, Any] = {**_LLAMA_SHAPE, "head_dim": 8, "pad_token_id": 0}
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=96, bos_token_id=0, eos_token_id=0,
    ),
    "llama": LlamaConfig(**_LLAMA_SHAPE, tie_word_embeddings=True),
    # rows in whole blocks of NF4, which bitsandbytes' CPU kernel needs (layers/packing.py)
    "llama-wide": LlamaConfig(**{**_LLAMA_SHAPE, "hidden_size": 64, "intermediate_size": 128}),
    "gemma2": Gemma2Config(**_GEMMA_SHAPE, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**_GEMMA_SHAPE),
    "granite": GraniteConfig(**_LLAMA_SHAPE, tie_word_embeddings=False, logits_scaling=4.0),
    "t5": T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip


def byte_tokenizer() -> Any:
    """One token a byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={END: 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)


def random_model(family: str) -> Any:
    """A random model of this family, the same every time."""
    config = CONFIGS[family]
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config)
        for parameter in model.parameters():
            # Wider than the usual start, so that what comes before a token matters to it.
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Any]:
    """Family -> a random model."""
    return random_model


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> a directory in Hugging Face form with a random model and the tokenizer of bytes."""

    @cache
    def directory(family: str) -> Path:
        path = tmp_path_factory.mktemp("models") / family
        random_model(family).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        return path

    return directory
