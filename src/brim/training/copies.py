"""A copy of the model on each rank: DDP, and ZeRO-1, which divides the optimizer's states among the copies.

DDP is PyTorch's: gradients lie in buckets, which are summed over the ranks while backward goes on. ZeRO-1 gives each
parameter's states, whole, to one rank, which steps it and sends it to the others. PyTorch's ZeroRedundancyOptimizer
does the same, but knows neither master copies nor optimizers of ours.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from brim.training.gloo import settled
from brim.training.ranks import Ranks


def copied(root: nn.Module, ranks: Ranks, *, apart: Sequence[nn.Parameter]) -> nn.Module:
    """`root` under DDP, but for the parameters `apart`, whose gradients backward does not bring."""
    assert ranks.data is not None
    names = [name for name, parameter in root.named_parameters() if any(parameter is other for other in apart)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(root, names)
    wrapped = DistributedDataParallel(
        root,
        process_group=ranks.data.get_group(),
        gradient_as_bucket_view=True,
        # All ranks read the same file, and begin from one seed.
        init_sync=False,
        forward_sync_buffers=False,
    )
    # The loss is divided by the targets of all ranks already: gradients are summed, and not averaged as DDP would.
    wrapped.register_comm_hook(ranks, _sum)
    return wrapped


def _sum(ranks: Ranks, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    summed: torch.futures.Future[Tensor] = torch.futures.Future()
    summed.set_result(ranks.add(bucket.buffer()))
    return summed


class Shares:
    """Whose each parameter's optimizer states are: the largest first, each to the rank that has least so far."""

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
        self._parameters, self._ranks = parameters, ranks
        sizes = [parameter.numel() for parameter in parameters]
        totals, shares = [0] * ranks.data_count, [list[int]() for _ in range(ranks.data_count)]
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            least = totals.index(min(totals))
            shares[least].append(index)
            totals[least] += sizes[index]
        # A rehearsal is that of the first rank, which is therefore given the largest share.
        self._shares = sorted(shares, key=lambda share: sum(sizes[index] for index in share), reverse=True)

    @property
    def own(self) -> list[nn.Parameter]:
        """Those that this rank steps."""
        return [self._parameters[index] for index in sorted(self._shares[self._ranks.data_rank])]

    def send(self) -> None:
        """Each rank's parameters to all others."""
        assert self._ranks.data is not None
        group = self._ranks.data.get_group()
        for rank, parameter in self._by_rank():
            settled(parameter.detach(), partial(dist.broadcast, group=group, group_src=rank))

    def _by_rank(self) -> Iterator[tuple[int, nn.Parameter]]:
        for rank, share in enumerate(self._shares):
            yield from ((rank, self._parameters[index]) for index in share)

    def discard_gradients(self) -> None:
        """Also of those that other ranks step."""
        for parameter in self._parameters:
            parameter.grad = None
