"""`library.sharding = "fsdp1"` against PyTorch's own FSDP1."""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, _runtime_utils
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from brim.training import checkpointing

BLOCKS = 4
CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A world of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Block(nn.Module):
    """Frozen, with an adapter that is a unit of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.adapter = unit(nn.Linear(8, 8, bias=False))

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(self.base(input) + self.adapter(input))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(unit(Block()) for _ in range(BLOCKS))

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=True)
        return hidden


def unit(module: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(module, device_id=CPU)


@pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning", "ignore::FutureWarning")  # a world of one; FSDP1 is old
def test_frozen_blocks_keep_input_and_gradient_as_under_fsdp1(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """When backward ends, each block has its input and its gradient alive: under FSDP1, and with ours."""

    def by_fsdp1() -> None:
        root = unit(Stack())
        root(torch.randn(2, 8, requires_grad=True)).sum().backward()

    def by_ours() -> None:
        config = LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=BLOCKS, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=32, use_cache=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config).train().requires_grad_(False)
        for layer in model.model.layers:
            layer.mlp.up_proj.requires_grad_(True)
        checkpointing.checkpoint_blocks(model, "full", held=True)
        model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()

    assert held(by_fsdp1, _runtime_utils, monkeypatch) == BLOCKS
    assert held(by_ours, checkpointing, monkeypatch) == BLOCKS


def held(run: Callable[[], None], module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> int:
    """Hooked tensors that live, with their gradient, when the first of the hooks is removed. None lives after."""
    hooked: list[weakref.ref[Tensor]] = []
    seen: list[int] = []
    register = torch.autograd.graph.register_multi_grad_hook

    class Handle:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def remove(self) -> None:
            tensors = [reference() for reference in hooked]
            seen.append(sum(tensor is not None and tensor.grad is not None for tensor in tensors))
            self.handle.remove()

    def spy(tensors: Any, hook: Any) -> Handle:
        hooked.extend(weakref.ref(tensor) for tensor in tensors)
        return Handle(register(tensors, hook))

    monkeypatch.setattr(module, "register_multi_grad_hook", spy)
    run()
    assert not [reference for reference in hooked if reference() is not None]
    return seen[0]
