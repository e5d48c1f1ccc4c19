"""Inference rehearsed on fake tensors against real runs, the whole loop, and the closed form of a cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from brim.checkpoints.convert import quantize
from brim.checkpoints.targets import Target
from brim.cli import main
from brim.hardware import find
from brim.inference.generate import write
from brim.inference.packed import stored_packings
from brim.inference.rehearsed import Written, rehearse_writing
from brim.memory.constants import context_bytes
from brim.memory.measured import CpuMeter
from brim.models import ModelSpec, describe
from brim.recipe import Recipe, Writing
from brim.rehearsal import rehearse_inference, writer

TOLERANCE = 0.001
WINDOW = 32
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 600,
        "max_position_embeddings": 256,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": 600,
             "bos_token_id": 0, "eos_token_id": 0},
    "gemma3": {
        "model_type": "gemma3_text", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 600,
        "sliding_window": WINDOW, "max_position_embeddings": 256, "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "tie_word_embeddings": True,
    },
}  # fmt: skip
CACHED_HEADS = {"llama": (2, 16), "gpt2": (4, 32), "gemma3": (1, 32)}
"""Heads whose keys and values are kept, and elements of each."""
REQUESTS = {
    "long prompt": Writing(batch_size=2, context=150, new_tokens=12),
    "long answer": Writing(batch_size=3, context=20, new_tokens=24),
    "from one token": Writing(context=1, new_tokens=40),
}


def small(name: str) -> ModelSpec:
    tied = name != "llama"
    return ModelSpec(name=name, kind="directory", config=CONFIGS[name], num_parameters=1, tied_head=tied)


def recipe_of(spec: ModelSpec, writing: Writing, dtype: str = "fp32") -> Recipe:
    recipe = Recipe(model=spec.name, seq_len=max(2, writing.context), micro_batch_size=writing.batch_size)
    return recipe.with_settings([f"precision.weights={dtype}"])


def rehearsed(spec: ModelSpec, writing: Writing, *, dtype: str = "fp32", every_token: bool = False) -> Written:
    recipe = recipe_of(spec, writing, dtype)
    return rehearse_writing(lambda: writer(spec, recipe), spec, writing, every_token=every_token)


def weights_line(spec: ModelSpec, recipe: Recipe, writing: Writing) -> int:
    return rehearse_writing(lambda: writer(spec, recipe), spec, writing).trace.peak_ledger().weights


def measured_peak(spec: ModelSpec, writing: Writing, *, dtype: str = "fp32") -> int:
    """Of really writing, by the allocator's own events."""
    with CpuMeter() as meter:
        model = writer(spec, recipe_of(spec, writing, dtype))
        meter.start_over()
        prompt = torch.randint(1, spec.vocab_size, (writing.batch_size, writing.context))
        write(model, {"input_ids": prompt, "pad_token_id": 0, "eos_token_id": None}, max_tokens=writing.new_tokens)
        meter.sample()
    return meter.peak.allocated_bytes


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_rehearsed_peak_is_the_real_peak(name: str, request_name: str) -> None:
    """Grouped heads, a sliding window, learned positions: fake and real runs peak at the same number of bytes."""
    spec, writing = small(name), REQUESTS[request_name]
    peak = rehearsed(spec, writing).trace.peak_bytes
    assert peak == pytest.approx(measured_peak(spec, writing), rel=TOLERANCE)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_real_models_peak(dtype: str) -> None:
    """SmolLM2-135M reads 2 x 200 tokens and writes 6: predicted within 0.1 % of the real run."""
    spec, writing = describe("smollm2-135m"), Writing(batch_size=2, context=200, new_tokens=6)
    peak = rehearsed(spec, writing, dtype=dtype).trace.peak_bytes
    assert peak == pytest.approx(measured_peak(spec, writing, dtype=dtype), rel=TOLERANCE)


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_token_stands_for_all(name: str, request_name: str) -> None:
    """Prompt, first and last token have the peak and the cache of the whole loop."""
    spec, writing = small(name), REQUESTS[request_name]
    short, whole = rehearsed(spec, writing), rehearsed(spec, writing, every_token=True)
    assert short.trace.peak_bytes == pytest.approx(whole.trace.peak_bytes, rel=TOLERANCE)
    assert short.kv_cache_bytes == whole.kv_cache_bytes
    assert len(short.trace.events) < len(whole.trace.events)


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_is_what_the_formula_says(name: str, request_name: str) -> None:
    """2 x layers x heads x width x tokens x bytes; a sliding layer keeps one token less than its window."""
    writing, (heads, width) = REQUESTS[request_name], CACHED_HEADS[name]
    tokens = writing.context + writing.new_tokens - 1  # the last one written is never read
    sliding = CONFIGS[name].get("layer_types", []).count("sliding_attention")
    kept = (3 - sliding) * tokens + sliding * min(tokens, WINDOW - 1)
    assert rehearsed(small(name), writing).kv_cache_bytes == 2 * writing.batch_size * heads * width * kept * 4


def test_a_gpus_ledger_adds_up() -> None:
    """Llama-3.1-8B, 4 x 8192 read, 512 written, on a GPU that is not here: every byte is on one line."""
    spec, device = describe("llama-3.1-8b"), find("h100")
    recipe = Recipe(model=spec.name, seq_len=8192, micro_batch_size=4)
    found = rehearse_inference(spec, recipe, new_tokens=512, device=device, budget_bytes=device.memory_bytes)
    assert found.inference is not None
    assert found.ledger.total == found.peak.device_bytes
    assert found.ledger.context == context_bytes(device)
    assert found.inference.kv_cache_bytes == 2 * 32 * 8 * 128 * 4 * (8192 + 511) * 2
    assert found.inference.kv_cache_at_peak_bytes <= found.ledger.activations
    weights = 2 * spec.num_parameters
    assert weights <= found.ledger.weights <= 1.001 * weights


def test_adapters_are_counted() -> None:
    """A LoRA recipe writes with its adapters: the weights' line grows by their size."""
    spec, writing = small("llama"), REQUESTS["from one token"]
    recipe = recipe_of(spec, writing)
    adapted = recipe.with_settings(["method=lora", 'lora.targets=["q_proj"]', "lora.rank=4"])
    bare, more = (weights_line(spec, chosen, writing) for chosen in (recipe, adapted))
    assert more - bare == 3 * 4 * (128 + 128) * 4


@pytest.mark.parametrize("to", ["int8", "int4", "fp8"])
def test_a_packed_models_peak(to: Target, tiny_directory: Callable[[str], Path], tmp_path: Path) -> None:
    """Files that hold packed weights: the modules and kernels that run are those rehearsed, and peak alike.

    Of a tiny model only after a long prompt: else the peak is a BF16 temporary inside one operator
    (`rehearsal.ERROR_BAND`).
    """
    quantize(tiny_directory("llama-wide"), tmp_path / to, to=to)
    spec, writing = describe(str(tmp_path / to)), Writing(context=60, new_tokens=8, batch_size=2)
    assert stored_packings(spec)
    peak = rehearsed(spec, writing, dtype="bf16").trace.peak_bytes
    assert peak == pytest.approx(measured_peak(spec, writing, dtype="bf16"), rel=TOLERANCE)


def test_the_command_line_predicts_inference(capsys: pytest.CaptureFixture[str]) -> None:
    """`brim predict --inference` adds one key to the JSON; the table has a line for the cache; too long is refused."""
    asked = ["predict", "smollm2-135m", "--inference", "--batch", "2", "--context", "64", "--new-tokens", "32"]
    assert main([*asked, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["inference"]["kv_cache_bytes"] == 2 * 30 * 3 * 64 * 2 * 95 * 2
    assert sum(printed["ledger"].values()) == printed["peak"]["allocated_bytes"]
    assert main(asked) == 0
    assert "kv_cache" in capsys.readouterr().out
    assert main(["predict", "gpt2", "--inference", "--context", "1024"]) == 2
    assert "1024 positions" in capsys.readouterr().err
    assert main(["predict", "google-bert/bert-base-uncased", "--inference"]) == 2
    assert "writes no text" in capsys.readouterr().err
