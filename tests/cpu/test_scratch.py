"""What operators take inside themselves, against the allocator's events while they run."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import brim.layers.packed_experts  # noqa: F401  FakeWorld patches it, and it cannot be imported on fake tensors
from brim.hardware import find
from brim.memory.fake import FakeWorld
from brim.memory.measured import highest_bytes
from brim.memory.scratch import scratch_bytes
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.rehearsal import rehearse_trace

FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)
SLACK_BYTES = 64
"""Numbers that an operator makes of Python's, and of tensors without dimensions."""
ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "compare": lambda a, b: a > b,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "by a row": lambda a, b: a * b[:1],
    "by a number": lambda a, b: a * b.sum(),
    "into the first": lambda a, b: a.add_(b) if torch.can_cast(torch.result_type(a, b), a.dtype) else a + b,
    "largest": lambda a, b: torch.maximum(a, b),
}
OTHERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda a, _: a.sum(dim=0, dtype=torch.float32),
    "mean": lambda a, _: a.mean(dim=-1),
    "power": lambda a, _: a.pow(2),
    "matmul": lambda a, b: a @ b.T,
    "weight's gradient": lambda a, b: a.T @ b,
    "with a bias": lambda a, b: functional.linear(a, b, b[:, 0]),
    "batched": lambda a, b: torch.bmm(a.view(4, 24, 64), b.view(4, 64, 24)),
    "attention": lambda a, b: functional.scaled_dot_product_attention(
        a.view(1, 4, 96, 16), b.view(1, 4, 96, 16), b.view(1, 4, 96, 16), is_causal=True
    ),
}
CASES = [
    *((name, work, pair) for (name, work), pair in product(ELEMENTWISE.items(), product(FORMATS, FORMATS))),
    *((name, work, (dtype, dtype)) for (name, work), dtype in product(OTHERS.items(), FORMATS[:3])),
]


def operands(formats: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    first, second = (torch.ones(96, 64).to(dtype) for dtype in formats)
    return first, second


def rehearsed(work: Callable[[Tensor, Tensor], Any], formats: tuple[torch.dtype, torch.dtype]) -> int:
    real = operands(formats)
    with FakeWorld() as world, torch.no_grad():
        first, second = map(world.bring, real)
        before = world.meter.trace.live_bytes
        world.meter.inside = scratch_bytes
        work(first, second)
        return world.meter.trace.peak_bytes - before


def measured(work: Callable[[Tensor, Tensor], Any], formats: tuple[torch.dtype, torch.dtype]) -> int:
    first, second = operands(formats)
    with torch.no_grad():
        work(first, second)
        first, second = operands(formats)
        return highest_bytes(lambda: work(first, second))


@pytest.mark.parametrize(("name", "work", "formats"), CASES, ids=[f"{n}-{p[0]}-{p[1]}" for n, _, p in CASES])
def test_an_operator_takes_what_the_allocator_gave(
    name: str, work: Callable[[Tensor, Tensor], Any], formats: tuple[torch.dtype, torch.dtype]
) -> None:
    """Outputs and what is given back before the operator returns are together the allocator's own peak."""
    if name == "divide" and torch.bool in formats:
        pytest.skip("no kernel")
    assert abs(rehearsed(work, formats) - measured(work, formats)) <= SLACK_BYTES


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that is run to be asked fails the test."""

    def refused(*_: object) -> int:
        raise AssertionError("an operator was run")

    monkeypatch.setattr("brim.memory.scratch._ask", refused)
    monkeypatch.setattr("brim.memory.scratch._ANSWERS", {})


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("rows", "inner", "columns"), [(16384, 8192, 16384), (1, 2**14, 2**14), (2**14, 2, 2**14)])
def test_no_large_operator_is_run(rows: int, inner: int, columns: int) -> None:
    """Many multiplications, a large operand or a large result: such an operator is not run, and takes its outputs."""
    with FakeWorld() as world:
        world.meter.inside = scratch_bytes
        left, right = torch.empty(rows, inner, dtype=torch.bfloat16), torch.empty(inner, columns, dtype=torch.bfloat16)
        before = world.meter.trace.live_bytes
        out = left @ right
        assert world.meter.trace.peak_bytes == before + out.nbytes


@pytest.mark.usefixtures("nothing_runs")
def test_a_gpu_asks_nothing_of_the_processor_here() -> None:
    """A rehearsal for a GPU runs no operator; the same recipe for a CPU does."""
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "vocab_size": 100,
    }  # fmt: skip
    spec = ModelSpec(name="llama", kind="directory", config=config, num_parameters=1, tied_head=False)
    recipe = Recipe(model="llama", seq_len=16, micro_batch_size=1)
    assert rehearse_trace(spec, recipe, device=find("h100"), whole_run=True).peak_bytes > 0
    with pytest.raises(AssertionError, match="an operator was run"):
        rehearse_trace(spec, recipe)
