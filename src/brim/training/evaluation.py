"""The loss on text that is not learned from."""

import torch

from brim.memory import owners
from brim.training.build import Workload
from brim.training.data import DataSet
from brim.training.step import batch_loss


def mean_loss(workload: Workload, held: DataSet) -> float:
    """Mean loss per target token over all of `held`, without dropout; model and random generators stay as they were."""
    size = workload.recipe.micro_batch_size
    total, num_targets = 0.0, sum(batch.num_targets for batch in held.in_order(size))
    workload.model.eval()
    try:
        with torch.no_grad(), workload.kernels():
            for batch in held.in_order(size):
                on_device = batch.mapped(lambda tensor: tensor.to(workload.device))
                total += float(batch_loss(workload, on_device, num_targets))
    finally:
        workload.model.train()
        owners.switch("workspace")
    return total
