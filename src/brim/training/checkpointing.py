"""Activation checkpointing: blocks keep their input, or also their matmuls' results, and run again in backward.

Selective keeps what linears (and experts' grouped matmuls) give: by far the most of a block's work, in tensors of a
token's width. All else is cheap and recomputed: norms, activations, and attention, whose batched products over scores
are not kept since those grow with the square of the length.

Reentrant: the block first runs without a graph. In backward it runs again from inputs of its own, and a backward of its
own goes through it, while its output and that output's gradient have names (torch/utils/checkpoint.py,
`CheckpointFunction`); the embedded tokens must ask for a gradient, which stays until the step's graph is gone.

Held: how adapters are trained under FSDP1 with reentrant checkpoints. To know when a frozen block may be freed, FSDP1
hooks the gradient of the block's input (torch/distributed/fsdp/_runtime_utils.py,
`_register_post_backward_reshard_only_hook`); a reentrant checkpoint makes that input a leaf, whose hook refers to the
node that accumulates its gradient, which refers to the leaf (torch/autograd/graph.py, `register_multi_grad_hook`). So
the input and its gradient stay until the hooks are removed at the end of backward, in each block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from brim.layers.packed_experts import PackedExperts
from brim.layers.packed_linear import PackedLinear

_KEPT = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._grouped_mm.default})


def checkpoint_blocks(
    base: PreTrainedModel,
    kind: Literal["none", "selective", "full"],
    *,
    reentrant: bool = False,
    held: bool = False,
) -> None:
    """Make the model's blocks run again in backward. Non-reentrant by default: frozen inputs (LoRA) need no hook, and
    only what is used again is kept. What is held is reentrant."""
    if kind == "none":
        return
    reentrant = reentrant or held
    settings: dict[str, Any] = {"use_reentrant": reentrant}
    if kind == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    base.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    if reentrant:
        for module in base.modules():
            if isinstance(module, PackedLinear | PackedExperts):
                module.multiplies_whole = True
        base.get_input_embeddings().register_forward_hook(_ask_for_gradient)
    if held:
        _hold_inputs(base)


def _ask_for_gradient(_: nn.Module, __: object, embedded_BTH: Tensor) -> None:
    """Else reentrant checkpoints of frozen blocks would have no backward."""
    embedded_BTH.requires_grad_(True)


def _hold_inputs(base: PreTrainedModel) -> None:
    """Hook each block's input as FSDP1 does, until the gradient has come to the embedded tokens."""
    handles: list[RemovableHandle] = []

    def hook_embedded(_: nn.Module, __: object, embedded_BTH: Tensor) -> None:
        embedded_BTH.register_hook(lambda _: remove())

    def remove() -> None:
        for handle in handles:
            handle.remove()
        handles.clear()

    def hooking(block: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            if torch.is_grad_enabled():
                handles.append(register_multi_grad_hook(inputs[:1], lambda _: None))
            return block(*inputs)

        return run

    base.get_input_embeddings().register_forward_hook(hook_embedded)
    for module in base.modules():
        if isinstance(module, GradientCheckpointingLayer):
            checkpoint = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = _composed(checkpoint, hooking)


def _composed(checkpoint: Callable[..., Any], hooking: Callable[..., Any]) -> Callable[..., Any]:
    return lambda block, *inputs: checkpoint(hooking(block), *inputs)


def _policy(_: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
