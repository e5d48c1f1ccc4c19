"""FSDP2's two collectives over gloo (processors), without memory of gloo's own.

gloo gathers into a second tensor as large as the result, and reduces a copy of its input. Here each rank's part is
broadcast into its place, and the sum is made where the input lies, which FSDP does not read again: the same numbers, no
scratch memory, and a rank takes what is rehearsed. On a GPU FSDP2's own collectives stay.

gloo's threads hold a collective's tensors for some microseconds after it is done. Whoever is the last to let go frees
the memory, and no profiler sees it in those threads; `settled` waits for them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllocMixin


def settled(tensor: Tensor, collective: Callable[[Tensor], object]) -> None:
    """Let `collective` work on the tensor; returns when gloo holds it no more."""
    before = _holders(tensor)
    collective(tensor.view(tensor.shape))
    while _holders(tensor) > before:
        time.sleep(0)


_PATIENCE_S = 0.01
"""A result that is held by others for longer has been looked at before it was waited for."""


@contextmanager
def settling() -> Iterator[None]:
    """The same for the collectives of spread tensors, whose results PyTorch waits for when they are first used."""
    wait = _functional_collectives.wait_tensor

    def until_settled(tensor: Tensor) -> Tensor:
        waited: Tensor = wait(tensor)  # type: ignore[no-untyped-call]
        patience_ends = time.monotonic() + _PATIENCE_S
        while _is_held(tensor) and time.monotonic() < patience_ends:
            time.sleep(0)
        return waited

    with mock.patch.object(_functional_collectives, "wait_tensor", until_settled):
        yield


def _is_held(tensor: Tensor) -> bool:
    """By anyone beside the caller: the tensor itself, or by a view its storage."""
    held: int = tensor._use_count()  # type: ignore[attr-defined]
    return held > 1 or _holders(tensor) > 2


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
