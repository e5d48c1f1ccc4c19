"""FSDP2's two collectives over gloo (processors), without memory of gloo's own.

gloo gathers into a second tensor as large as the result, and reduces a copy of its input. Here each rank's part is
broadcast into its place, and the sum is made where the input lies, which FSDP does not read again: the same numbers, no
scratch memory, and a rank takes what is rehearsed. On a GPU FSDP2's own collectives stay.

gloo's threads hold a collective's tensors for some microseconds after it is done. Whoever is the last to let go frees
the memory, and no profiler sees it in those threads; `settled` waits for them.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllocMixin


def settled(tensor: Tensor, collective: Callable[[Tensor], object]) -> None:
    """Let `collective` work on the tensor; returns when gloo holds it no more."""
    before = _holders(tensor)
    collective(tensor.view(tensor.shape))
    while _holders(tensor) > before:
        time.sleep(0)


def _holders(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


class GatherByBroadcast(DefaultAllocMixin, AllGather):
    """The rank's own part (`input_tensor`) lies in its place in `output_tensor` already."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        settled(output_tensor, partial(_broadcast_parts, group=group))


class ReduceInPlace(DefaultAllocMixin, ReduceScatter):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        settled(input_tensor, partial(dist.all_reduce, op=op, group=group))
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])


def _broadcast_parts(whole: Tensor, *, group: dist.ProcessGroup) -> None:
    for source, part in enumerate(whole.chunk(group.size())):
        dist.broadcast(part, group=group, group_src=source)
