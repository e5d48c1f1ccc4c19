"""Shorter models of the same blocks: some that a long model continues, each a period of blocks longer than the last.

Blocks are alike when their modules, shapes and settings are: a period is found in them, not in a list of families
(Gemma's five sliding windows and one full attention; DeepSeek's dense blocks before those with experts).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from brim.models.skeleton import skeleton
from brim.models.spec import ModelSpec, Task

_DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip
"""Config keys that count blocks."""
_SHORTEST = 1
"""Blocks of the first."""
_NUM_SPECS = 4
"""Three of them suffice where the first is like the others, four where its one block is both first and last."""
_WORTH_IT = 0.75
"""Share of the model's blocks that the first three may have together."""
_INDICES = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx"})
"""What differs in any two blocks and says nothing of their shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Each of `specs` has a period of blocks more than the one before it, and the whole `times` more than the first."""

    specs: tuple[ModelSpec, ...]
    times: int


def series(spec: ModelSpec, *, task: Task) -> Series | None:
    """None where the blocks have no period, or too few of them repeat to be worth it.

    Nor for an encoder and a decoder: the two loops' alike tensors are freed in no order that a splice would know.
    """
    if spec.is_encoder_decoder:
        return None
    whole = _stacks(spec, task)
    depth = min((len(blocks) for blocks in whole.values()), default=0)
    for period in range(1, depth):
        shortest = _SHORTEST + (depth - _SHORTEST) % period
        if 3 * (shortest + period) > _WORTH_IT * depth:
            continue
        removed = depth - shortest
        if all(_repeats(blocks, len(blocks) - removed, period) for blocks in whole.values()):
            specs = tuple(_shortened(spec, removed - period * more) for more in range(_NUM_SPECS))
            longest = removed - period * (_NUM_SPECS - 1)
            kept = {name: blocks[: len(blocks) - longest] for name, blocks in whole.items()}
            if _stacks(specs[-1], task) == kept:
                return Series(specs=specs, times=removed // period)
    return None


def _repeats(blocks: Sequence[object], shortest: int, period: int) -> bool:
    """Each block after the first repetition is as the one a period before it."""
    return all(blocks[index] == blocks[index - period] for index in range(shortest + period, len(blocks)))


def _shortened(spec: ModelSpec, removed: int) -> ModelSpec:
    """The model with this many blocks less in each stack; lists with an entry for each block shrink with them."""
    depths = _depths(spec)
    config: dict[str, Any] = {}
    for key, value in spec.config.items():
        if key in _DEPTHS and isinstance(value, int):
            config[key] = value - removed
        elif isinstance(value, list) and len(value) in depths:
            config[key] = value[: len(value) - removed]
        else:
            config[key] = value
    return replace(spec, config=config)


def _stacks(spec: ModelSpec, task: Task) -> dict[str, list[object]]:
    """Name of each list of blocks -> what tells its blocks apart, in order."""
    with torch.device("meta"):
        model = skeleton(spec, dtype="bf16", attention=spec.attention, task=task)
    stacks: dict[str, list[object]] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) in _depths(spec) and not inside:
            stacks[name] = [_looks(block, index, model) for index, block in enumerate(module)]
    return stacks


def _depths(spec: ModelSpec) -> set[int]:
    return {spec.config[key] for key in _DEPTHS if isinstance(spec.config.get(key), int)}


def _looks(block: nn.Module, index: int, model: PreTrainedModel) -> object:
    """Modules with their settings, tensors with their shapes, and what the config says of this block."""
    modules = [(name, type(module), *_settings(module)) for name, module in block.named_modules()]
    named = chain(block.named_parameters(), block.named_buffers())
    tensors = [(name, tensor.shape, tensor.dtype) for name, tensor in named]
    kinds = getattr(model.config, "layer_types", None)
    return modules, tensors, kinds and kinds[index]


def _settings(module: nn.Module) -> Iterator[tuple[str, object]]:
    for name, value in vars(module).items():
        if name not in _INDICES and isinstance(value, bool | int | float | str | None):
            yield name, value
