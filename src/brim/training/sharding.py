"""A model over many devices, by PyTorch's own engine.

ZeRO-3 is FSDP2's `fully_shard` (each block is gathered when it is needed and freed after), ZeRO-2 the same with blocks
that stay gathered from forward to their backward, HSDP the same on a mesh of two axes (shards within a node, copies
across). A block is what transformers checkpoints; the rest (embedding, head, last norm) is gathered for the whole step.
DDP and ZeRO-1, whose ranks hold whole copies, are in `copies`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from brim.layers.one_kernel import aside
from brim.layers.packed_experts import PackedExperts
from brim.layers.packed_linear import PackedLinear
from brim.memory import owners
from brim.recipe import Recipe
from brim.training.copies import copied
from brim.training.gloo import GatherByBroadcast, ReduceInPlace
from brim.training.head import LossModule
from brim.training.ranks import Ranks
from brim.training.shards_at_home import bring_buffers, keep_parts_at_home

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_COMMUNICATION = ("unshard", "wait_for_unshard", "post_backward")
"""Of a parameter group: where it gathers parameters and where it reduces gradients."""


_GATHERS_AHEAD = "_backward_prefetch"
_WAITS = "wait_for_unshard"
_REDUCES = "post_backward"


def shard(root: LossModule, recipe: Recipe, ranks: Ranks) -> nn.Module:
    """`root` as it is to be called, its parameters spread over the ranks."""
    if ranks.data_count == 1:
        return root
    match recipe.parallel.sharding:
        case "ddp" | "zero1":
            return copied(root, ranks, apart=root.head.apart)
        case "zero2" | "zero3" | "hsdp":
            return _fully_shard(root, recipe, ranks)
        case _:
            return root


def _fully_shard(root: nn.Module, recipe: Recipe, ranks: Ranks) -> nn.Module:
    policy = MixedPrecisionPolicy()
    if casts_when_gathered(recipe):
        # Gradients are added up in FP32: over hundreds of ranks, BF16 would lose them.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    settings: dict[str, Any] = {"mesh": ranks.data, "mp_policy": policy}
    at_home = recipe.memory.offloads_weights
    if at_home:
        assert ranks.data is not None
        bring_buffers(root, torch.device(ranks.data.device_type))
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=not ranks.over_gloo and torch.cuda.is_available())
    for module in root.modules():
        if isinstance(module, PackedLinear | PackedExperts):
            module.make_codes_divisible()
    for block in blocks_of(root):
        fully_shard(block, reshard_after_forward=recipe.parallel.sharding != "zero2", **settings)
    fully_shard(root, reshard_after_forward=False, **settings)
    root.register_forward_hook(_divide_again)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the targets of all ranks already, so gradients are summed and not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if ranks.over_gloo:
                module.set_custom_all_gather(GatherByBroadcast())
                module.set_custom_reduce_scatter(ReduceInPlace())
            _watch(module, in_flat=recipe.library.sharding == "fsdp1")
            if at_home:
                keep_parts_at_home(module)
            if recipe.library.accumulation == "whole":
                _keep_whole_gradients(module)
            if recipe.library.sharding == "fsdp1" and recipe.adapts:
                _gather_no_block_ahead(module)
    return root


def _divide_again(root: nn.Module, _: object, __: object) -> None:
    """What has no block is gathered until backward is done with it; without a backward, nothing else would divide it,
    and checkpoints would write it whole."""
    if not torch.is_grad_enabled():
        assert isinstance(root, FSDPModule)
        root.reshard()


def casts_when_gathered(recipe: Recipe) -> bool:
    """Sharded FP32 weights become BF16 as they are gathered: autocast would gather them in FP32."""
    precision, parallel = recipe.precision, recipe.parallel
    sharded = parallel.divides_weights and parallel.data_ranks > 1
    return precision.weights == "fp32" and precision.compute == "bf16" and sharded


def blocks_of(root: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks, those of encoder and decoder both."""
    return [module for module in root.modules() if isinstance(module, GradientCheckpointingLayer)]


def _watch(module: FSDPModule, *, in_flat: bool) -> None:
    """What the engine allocates in these methods is the ledger's `gathered`.

    `in_flat`: FSDP1 has no copy of what it gathers, so that parameters lie in the memory of the stream that gathered
    them (torch/distributed/fsdp/_runtime_utils.py, `_unshard`).
    """
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for name in _COMMUNICATION:
            setattr(group, name, _gathering(getattr(group, name)))
        if in_flat:
            setattr(group, _WAITS, _where_gathered(group, group.wait_for_unshard))


def _gather_no_block_ahead(module: FSDPModule) -> None:
    """Under FSDP1 each adapter's matrix is a unit of its own (peft.utils.other, fsdp_auto_wrap_policy), and what is
    gathered while a block goes backward is the unit before it in order: its own last adapter, not the next block."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        setattr(group, _GATHERS_AHEAD, _nothing)


def _keep_whole_gradients(module: FSDPModule) -> None:
    """Under FSDP1 a unit's parameters are one flat one, whose gradient has a place for the frozen, too, and stays whole
    until it is reduced (torch/distributed/fsdp/_runtime_utils.py, `_post_backward_hook`). Ignored: its divided form,
    from the reduction to the step."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        setattr(group, _REDUCES, _keeping_frozen(group, group.post_backward))


def _keeping_frozen(group: Any, method: Callable[[], None]) -> Callable[[], None]:
    held: list[Tensor] = []

    def post_backward() -> None:
        if group.reduce_grads:
            held.clear()
        elif not held:
            with owners.inside("gradients"):
                frozen = [part for part in group.fsdp_params if not part.sharded_param.requires_grad]
                held.extend(torch.zeros(part._orig_size, dtype=part.sharded_param.dtype) for part in frozen)
        method()

    return post_backward


def _nothing() -> None:
    pass


def _where_gathered(group: Any, method: Callable[[], None]) -> Callable[[], None]:
    def waiting() -> None:
        # on a CPU: of its streams, which are names, the rehearsal knows apart what a GPU's allocator would
        with torch.cpu.stream(group.comm_ctx.all_gather_copy_in_stream):
            method()

    return waiting


def _gathering(method: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    @aside  # in a queue of its own; and how gloo does it says nothing of NCCL
    @wraps(method)
    def watched(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with owners.inside("gathered"):
            return method(*args, **kwargs)

    return watched
