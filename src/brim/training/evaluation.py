"""The loss on text that is not learned from."""

from collections.abc import Sequence

import torch

from brim.memory import owners
from brim.training.batches import Batch
from brim.training.build import Workload
from brim.training.dataset import DataSet
from brim.training.step import batch_loss


def mean_loss(workload: Workload, held: DataSet) -> float:
    """Mean loss per target token over all of `held`, in the recipe's micro-batches; see `loss_over`."""
    return loss_over(workload, list(held.in_order(workload.recipe.micro_batch_size)))


def loss_over(workload: Workload, batches: Sequence[Batch]) -> float:
    """Mean loss per target token, without dropout; model and random generators stay as they were.

    Ranks take turns. Who has no batch in the last turn reads the first once more, since all must take part in gathering
    the weights, and does not count it.
    """
    ranks = workload.ranks
    num_targets = sum(batch.num_targets for batch in batches)
    total = torch.zeros((), dtype=torch.float64, device=workload.device)
    workload.model.eval()
    try:
        with torch.no_grad(), workload.kernels():
            for first in range(0, len(batches), ranks.data_count):
                owners.rest()
                index = first + ranks.data_rank
                batch = batches[index if index < len(batches) else 0]
                loss = batch_loss(workload, batch.mapped(lambda tensor: tensor.to(workload.device)), num_targets)
                if index < len(batches):
                    total += loss
    finally:
        workload.model.train()
        owners.switch("workspace")
    return float(ranks.add(total))
