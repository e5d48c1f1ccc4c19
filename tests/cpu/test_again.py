"""Pieces that a rehearsal tells again without running them, against the rehearsal that runs each."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from brim.hardware import find
from brim.layers import chunked_loss
from brim.memory import again, fake
from brim.memory.splice import ordered
from brim.memory.trace import Trace
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.rehearsal import whole_trace
from brim.speed.operators import OperatorMeter

_CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "families.json").read_text(encoding="utf-8")
)
_CASES = [
    ("llama", ("method=qlora", "precision.weights=int4", "precision.group_size=8"), "h100"),
    ("gemma-2", ("precision.weights=fp32", "memory.attention=eager", "grad_accumulation=2"), "h100"),
    ("qwen3-moe", ("method=qlora", "precision.weights=int8"), "h100"),
]

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")


def _rehearsed(name: str, settings: tuple[str, ...], device: str) -> tuple[Trace, OperatorMeter]:
    config = _CONFIGS[name] | {"num_hidden_layers": 1}
    spec = ModelSpec(name=name, kind="directory", config=config, num_parameters=1, tied_head=True)
    recipe = Recipe(model=name, micro_batch_size=2, seq_len=24).with_settings(
        ["memory.loss=chunked", "memory.activation_checkpointing=full", *settings]
    )
    meter = OperatorMeter()
    on = None if device == "cpu" else find(device)
    return whole_trace(spec, recipe, device=on, operators=meter, whole_run=True), meter


def _told(trace: Trace) -> list[tuple[bool, int, str, int, int]]:
    names: dict[int, int] = {}
    return [
        (allocated, block.nbytes, block.line, block.stream, names.setdefault(id(block), len(names)))
        for allocated, block in ordered(trace)
    ]


@pytest.mark.parametrize(("name", "settings", "device"), _CASES, ids=["int4", "trained head", "experts"])
def test_a_piece_told_again_leaves_what_it_leaves_when_it_is_run(
    name: str, settings: tuple[str, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every allocation, free, owner and operator is that of a rehearsal in which nothing is told again."""
    monkeypatch.setattr(chunked_loss, "_CHUNK_BYTES", 1)  # chunks of 16 tokens
    with mock.patch.object(again.Again, "_repeat", autospec=True, side_effect=again.Again._repeat) as repeats:
        trace, meter = _rehearsed(name, settings, device)
    assert repeats.call_count > 4
    monkeypatch.setattr(fake, "_PIECES", ())
    whole, whole_meter = _rehearsed(name, settings, device)
    assert _told(trace) == _told(whole)
    assert trace.moments == whole.moments
    assert meter.work == whole_meter.work
