"""Rehearsal of inference: `write`, the very loop that generates, on fake tensors under the meter.

Not each of its tokens is rehearsed. While tokens are written one by one, memory is weights, cache and what one token
takes, of which only the cache grows: the highest point of that phase is its last step. The prompt's step is another
matter, as all its tokens pass at once. So the prompt and the first token are run, the cache is made as long as it will
be, and the last token is run; tests hold the peak of that equal to the whole loop's.

Rows are of equal length, so no mask is materialized; sequences do not end early.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionLayer,
)

from brim.errors import UsageError
from brim.hardware import Device
from brim.inference.generate import write
from brim.memory import owners
from brim.memory.cuda import cuda_kernels
from brim.memory.fake import FakeWorld
from brim.memory.scratch import scratch_bytes
from brim.memory.trace import Trace
from brim.models import ModelSpec
from brim.recipe import Writing

KV_CACHE = "activations/kv_cache"
"""The part of the activations' line that the cache of keys and values (or of states, without attention) is."""
_FEW_TOKENS = 4
"""Up to here every token is rehearsed."""


def check_room(spec: ModelSpec, writing: Writing) -> None:
    """Raises UsageError where the model has no position for the last token, or writes nothing."""
    if spec.task not in ("causal-lm", "seq2seq-lm"):
        raise UsageError(f"{spec.name} is a {spec.model_type}: it writes no text; name a causal model")
    positions = spec.num_positions
    needed = writing.context + (0 if spec.is_encoder_decoder else writing.new_tokens)
    if positions and needed > positions:
        raise UsageError(
            f"{writing.context} tokens read and {writing.new_tokens} written pass the {positions} positions of "
            f"{spec.name}; ask for fewer (--context, --new-tokens)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What writing took."""

    trace: Trace
    kv_cache_bytes: int
    """Of the cache when it was largest; while it grows, one layer's old and new keys or values exist at once."""


def rehearse_writing(
    make_model: Callable[[], PreTrainedModel],
    spec: ModelSpec,
    writing: Writing,
    *,
    device: Device | None = None,
    every_token: bool = False,
) -> Written:
    """Every allocation and free of writing, by owner, from when the model is made. None as the device: a CPU.

    `every_token`: the whole loop, to check the short cut against.
    """
    # token 0 is said to be padding, and a prompt that holds padding has a mask
    prompt = torch.randint(1, spec.vocab_size, (writing.batch_size, writing.context))
    with FakeWorld() as world, owners.listening(world.meter), ExitStack() as stack:
        if device is not None and device.kind == "cuda":
            stack.enter_context(cuda_kernels(device, world.meter))
        else:
            world.meter.inside = scratch_bytes
        owners.switch("weights")
        model = make_model().eval()
        owners.claim("weights", [*model.parameters(), *model.buffers()])
        # random weights are made another way than stored ones are read
        world.meter.trace.forget_past()
        owners.switch("activations")
        watch = CacheWatch(model)
        _write_on(model, watch, world.bring(prompt), writing, every_token=every_token)
        return Written(trace=world.meter.trace, kv_cache_bytes=watch.largest_bytes)


def _write_on(
    model: PreTrainedModel, watch: "CacheWatch", prompt_BT: Tensor, writing: Writing, *, every_token: bool
) -> None:
    settings = {"pad_token_id": 0, "eos_token_id": None}
    first = {**settings, "input_ids": prompt_BT}
    if writing.logits == "all":
        first["logits_to_keep"] = 0
    skipped = writing.new_tokens - _FEW_TOKENS
    if every_token or skipped <= 0:
        write(model, first, max_tokens=writing.new_tokens)
        return
    write(model, first, max_tokens=2)
    cache = watch.cache
    if cache is None or not _can_lengthen(cache):
        write(model, first, max_tokens=writing.new_tokens)
        return
    _lengthen(cache, skipped)
    watch.claim()
    read = writing.context + writing.new_tokens - 2
    # all but two tokens are in the cache; a view of one column, since the prompt itself is counted already
    longer = prompt_BT[:, :1].expand(-1, read)
    write(model, {**settings, "input_ids": longer, "past_key_values": cache}, max_tokens=2)


class CacheWatch:
    """Says after each forward whose the cache's tensors are; keeps the cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.cache: Any = None
        self.largest_bytes = 0
        model.register_forward_hook(self._after)

    def claim(self) -> None:
        held = _tensors(self.cache)
        owners.claim(KV_CACHE, held)
        self.largest_bytes = max(self.largest_bytes, sum(tensor.nbytes for tensor in held))

    def _after(self, model: object, args: object, output: Any) -> None:
        self.cache = output.get("past_key_values", output.get("cache_params"))
        if self.cache is not None:
            self.claim()


def _layers(cache: Any) -> list[Any]:
    if isinstance(cache, EncoderDecoderCache):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return list(cache.layers)


def _tensors(cache: Any) -> list[Tensor]:
    """What the cache holds, whatever its layers call it."""
    found: list[Tensor] = []
    for layer in _layers(cache):
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            found += [item for item in values if isinstance(item, Tensor) and item.is_floating_point()]
    return found


def _can_lengthen(cache: Any) -> bool:
    """Keys and values alone grow; what else a family caches grows in its own way, and is rehearsed token by token."""
    known = (DynamicLayer, LinearAttentionLayer)
    return all(isinstance(layer, known) and not isinstance(layer, DynamicIndexedLayer) for layer in _layers(cache))


def _lengthen(cache: Any, num_tokens: int) -> None:
    """As if `num_tokens` more had been written; a layer with a window holds no more than that."""
    layers = cache.self_attention_cache.layers if isinstance(cache, EncoderDecoderCache) else cache.layers
    for layer in layers:
        if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
            continue
        length = layer.keys.shape[-2] + num_tokens
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length += num_tokens
            length = min(length, layer.sliding_window - 1)
        layer.keys, layer.values = _of_length(layer.keys, length), _of_length(layer.values, length)


def _of_length(states_BHTD: Tensor, length: int) -> Tensor:
    rows, heads, _, width = states_BHTD.shape
    return states_BHTD.new_zeros(rows, heads, length, width)
