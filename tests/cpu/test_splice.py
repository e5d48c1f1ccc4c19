"""A rehearsal that runs three short models instead of a long one, against the one that runs every block."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from brim.hardware import find
from brim.memory.allocator import replay
from brim.memory.splice import ordered
from brim.memory.trace import Trace
from brim.models import ModelSpec, describe
from brim.models.series import series
from brim.recipe import Recipe
from brim.rehearsal import rehearse_trace, splice, whole_trace
from brim.speed.operators import OperatorMeter

_CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "families.json").read_text(encoding="utf-8")
)
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "num_decoder_layers", "encoder_layers", "decoder_layers")
_FULL = ("library.adamw=foreach", "grad_accumulation=2")
_LORA = ("method=lora", "memory.activation_checkpointing=full")
_MIXED = ("precision.weights=fp32", "memory.loss=chunked", "optimizer.name=sgd")
_MASTER = ("precision.master=fp32", "memory.activation_checkpointing=selective")
_IN_BACKWARD = ("optimizer.in_backward=true", "optimizer.max_grad_norm=0.0", "optimizer.name=adafactor")
_LORA_MIXED = ("method=lora", "precision.weights=fp32", "memory.loss=chunked", "optimizer.name=lion")
_OFFLOADED = ("memory.offload=optimizer", "precision.master=fp32")
_ZERO_3 = ("parallel.sharding=zero3", "parallel.devices_per_node=3")
_ZERO_2 = ("parallel.sharding=zero2", "parallel.devices_per_node=4", "precision.weights=fp32", "grad_accumulation=2")
_HSDP = ("parallel.sharding=hsdp", "parallel.nodes=2", "parallel.devices_per_node=4", "method=lora")
_CHECKPOINTED = "memory.activation_checkpointing=full"
_SHARDED = [
    ("llama", 10, (*_ZERO_3, _CHECKPOINTED), "h100"), ("qwen3-moe", 8, _ZERO_2, "cpu"),
    ("gpt-2", 8, _HSDP, "cpu"), ("llama", 8, (*_ZERO_3, "parallel.devices_per_node=4", "parallel.tensor=2"), "cpu"),
    ("gemma-2", 16, (*_ZERO_3, _CHECKPOINTED, "memory.loss=chunked"), "cpu"),
]  # fmt: skip
_QLORA = ("method=qlora", "precision.weights=nf4")
_CASES = [
    ("llama", 8, _LORA_MIXED), ("gpt-2", 8, _MASTER), ("bloom", 8, _QLORA),
    ("qwen3-moe", 8, _LORA), ("deepseek-v3", 8, _FULL), ("mamba-2", 8, _MIXED), ("bert", 8, _IN_BACKWARD),
    ("gpt-oss", 16, _LORA), ("llama", 8, ("method=qlora", "precision.weights=int8", "optimizer.name=adafactor")),
]  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
    # transformers 5.23 renames its checkpointing methods; PEFT 0.21 still calls the old ones.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
]


def deep(name: str, depth: int) -> ModelSpec:
    """A family's small model with this many blocks, their kinds in turn."""
    config = dict(_CONFIGS[name])
    config |= {key: depth for key in _DEPTHS if key in config}
    if "layer_types" in config:
        config["layer_types"] = (config["layer_types"] * depth)[:depth]
    tied = config.get("tie_word_embeddings", True)
    return ModelSpec(name=name, kind="directory", config=config, num_parameters=1, tied_head=tied)


def events(trace: Trace) -> list[tuple[bool, int, str, int]]:
    names: dict[int, int] = {}
    return [
        (allocated, block.nbytes, block.line, names.setdefault(id(block), len(names)))
        for allocated, block in ordered(trace)
    ]


@pytest.mark.parametrize(
    ("name", "depth", "settings", "device"),
    [*((*case, "cpu") for case in _CASES), (*_CASES[0], "h100"), ("gpt-2", 8, _OFFLOADED, "h100"), *_SHARDED],
    ids=[
        *(name for name, *_ in _CASES),
        "on a GPU",
        "offloaded",
        "zero3",
        "zero2",
        "hsdp",
        "zero3 x tensor",
        "zero3 by period",
    ],
)
def test_a_spliced_trace_is_the_whole_trace(name: str, depth: int, settings: tuple[str, ...], device: str) -> None:
    """Peak, ledger, every event with the block that it ends, what the allocator reserves and all operators: equal."""
    spec, gpu = deep(name, depth), None if device == "cpu" else find(device)
    recipe = Recipe(model=name, task=spec.task, seq_len=32, micro_batch_size=2)
    recipe = recipe.with_settings([*settings, f"memory.attention={spec.attention}"])
    shorter = series(spec, task=spec.task)
    assert shorter is not None
    few, all_of_them = OperatorMeter(), OperatorMeter()
    spliced = splice(shorter, recipe, device=gpu, operators=few, whole_run=True)
    assert spliced is not None
    whole = whole_trace(spec, recipe, device=gpu, operators=all_of_them, whole_run=True)
    assert few.work == all_of_them.work
    assert events(spliced) == events(whole)
    assert spliced.peak_bytes == whole.peak_bytes
    assert spliced.peak_ledger() == whole.peak_ledger()
    assert spliced.moment_peaks() == whole.moment_peaks()
    assert replay(spliced) == replay(whole)
    assert (spliced.host is None) == (whole.host is None)
    if spliced.host is not None and whole.host is not None:
        assert events(spliced.host) == events(whole.host)


def test_short_models_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rehearsal of 30 blocks runs models of 1, 2 and 3; the whole is not run."""
    run = []

    def counted(spec: ModelSpec, recipe: Recipe, **rest: Any) -> Trace:
        run.append(spec.num_layers)
        return whole_trace(spec, recipe, **rest)

    monkeypatch.setattr("brim.rehearsal.whole_trace", counted)
    rehearse_trace(describe("smollm2-135m"), Recipe(model="smollm2-135m", seq_len=16))
    assert run == [1, 2, 3]


def test_periods_are_found_in_the_blocks() -> None:
    """Blocks that differ in turn go by whole turns; no order, few blocks, or an odd one at the end: none."""
    gemma = deep("gemma-2", 16)
    found = series(gemma, task=gemma.task)
    assert found is not None
    assert [spec.num_layers for spec in found.specs] == [2, 4, 6, 8]
    assert found.times == 7
    kinds = ["full_attention" if index in (1, 2, 7, 11) else "sliding_attention" for index in range(16)]
    odd = [*["sliding_attention"] * 15, "full_attention"]
    gemma_3 = deep("gemma-3", 16)
    for layer_types in (kinds, odd):
        spec = replace(gemma_3, config={**gemma_3.config, "layer_types": layer_types})
        assert series(spec, task=spec.task) is None
    assert series(deep("llama", 7), task="causal-lm") is None
    dense_first = deep("deepseek-v3", 8)
    assert series(dense_first, task="causal-lm") is not None
