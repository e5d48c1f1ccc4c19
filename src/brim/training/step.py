"""One optimizer step: micro-batches forward and backward, then the update. Rehearsed and real runs call this."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from brim.memory import owners
from brim.training.batches import Batch
from brim.training.build import Workload
from brim.training.clipping import clip, norm_of
from brim.training.loss_scale import unscaling
from brim.training.parts import part_of


def train_step(workload: Workload, batches: Sequence[Batch], *, learning_rate: float) -> Tensor:
    """Mean loss per target token over all micro-batches of all ranks (an FP32 scalar); the parameters are updated.

    NaN where a gradient was no number and clipping saw it: the parameters are then what they were.
    The mean is over all tokens of the step, not of means, so neither accumulation nor sharding changes what is learned.
    """
    num_targets = max(1, sum(batch.num_targets for batch in batches))
    workload.optimizer.set_learning_rate(learning_rate)
    total = torch.zeros((), dtype=torch.float32, device=workload.device)
    scale = workload.loss_scale.value if workload.loss_scale is not None else 1.0
    for index, batch in enumerate(batches):
        if index:
            owners.rest()
        with workload.accumulating(is_last=index + 1 == len(batches)):
            total += _backward(workload, batch.mapped(lambda tensor: tensor.to(workload.device)), num_targets / scale)
    owners.switch("workspace")
    _add_apart(workload)
    trainable = [parameter for parameter in workload.model.parameters() if parameter.requires_grad]
    owners.claim("gradients", [parameter.grad for parameter in trainable if parameter.grad is not None])
    if not _update(workload, trainable):
        total.fill_(math.nan)
    owners.claim("optimizer", workload.optimizer.tensors())
    return workload.ranks.add(total / scale if scale != 1.0 else total)


def _add_apart(workload: Workload) -> None:
    """Sum the gradients that the engine leaves to each rank."""
    if workload.recipe.parallel.copies_weights:
        for parameter in workload.head.apart:
            if parameter.grad is not None:
                workload.ranks.add(parameter.grad)
    for parameter in workload.summed:
        if parameter.grad is not None:
            workload.ranks.add_matrices(part_of(parameter.grad))


def _update(workload: Workload, trainable: Sequence[Tensor]) -> bool:
    """Clip and step; under loss scaling, skip the step when a gradient has overflowed.

    False where clipping, which asks for the norm of all gradients, found one that is no number: nothing was stepped.
    """
    max_norm, scale = workload.recipe.optimizer.max_grad_norm, workload.loss_scale
    if scale is None:
        if max_norm:
            norm = clip(trainable, max_norm)
            if not math.isfinite(norm.item()):
                workload.optimizer.discard_gradients()
                return False
        workload.optimizer.step()
        return True
    norm = norm_of([parameter.grad for parameter in trainable if parameter.grad is not None])
    factor = unscaling(norm, scale, max_norm=max_norm)
    if factor is None:
        workload.optimizer.discard_gradients()
    else:
        workload.optimizer.step(factor)
    scale.update(finite=factor is not None)
    return True


def _backward(workload: Workload, batch: Batch, num_targets: float) -> Tensor:
    """This micro-batch's share of the mean loss; its gradients are added up in the parameters."""
    # backward, too: checkpointed blocks run forward in it
    with workload.kernels():
        loss = batch_loss(workload, batch, num_targets)
        loss.backward()
    owners.switch("workspace")
    return loss.detach()


def batch_loss(workload: Workload, batch: Batch, num_targets: float) -> Tensor:
    """This micro-batch's share of the mean loss over `num_targets` tokens."""
    owners.switch("activations")
    with workload.autocast():
        loss: Tensor = workload.loss(_inputs(workload, batch), batch.labels, scale=1 / num_targets, soft=batch.soft)
    return loss


def _inputs(workload: Workload, batch: Batch) -> dict[str, Tensor]:
    inputs = {"input_ids": batch.input_ids}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if workload.recipe.task == "seq2seq-lm":
        inputs["decoder_input_ids"] = workload.base.prepare_decoder_input_ids_from_labels(labels=batch.labels)
    return inputs
