"""The loss on text that is not learned from."""

import torch

from brim.memory import owners
from brim.training.build import Workload
from brim.training.data import DataSet
from brim.training.step import batch_loss


def mean_loss(workload: Workload, held: DataSet) -> float:
    """Mean loss per target token over all of `held`, without dropout; model and random generators stay as they were.

    Ranks take turns. Who has no batch in the last turn reads the first once more, since all must take part in gathering
    the weights, and does not count it.
    """
    size, ranks = workload.recipe.micro_batch_size, workload.ranks
    batches = list(held.in_order(size))
    num_targets = sum(batch.num_targets for batch in batches)
    total = torch.zeros((), dtype=torch.float64, device=workload.device)
    workload.model.eval()
    try:
        with torch.no_grad(), workload.kernels():
            for first in range(0, len(batches), ranks.data_count):
                index = first + ranks.data_rank
                batch = batches[index if index < len(batches) else 0]
                loss = batch_loss(workload, batch.mapped(lambda tensor: tensor.to(workload.device)), num_targets)
                if index < len(batches):
                    total += loss
    finally:
        workload.model.train()
        owners.switch("workspace")
    return float(ranks.add(total))
