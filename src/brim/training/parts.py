"""A rank's part of a tensor that is spread over ranks, and the whole again; of any other tensor, itself."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def part_of(tensor: Tensor) -> Tensor:
    """What of it is in this process, sharing its storage."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def spread_of(tensor: Tensor) -> DeviceMesh | None:
    """The ranks that it is spread over; None: it is whole."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def spread_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient, spread over ranks as its parameter is: a sum over them may be still to be made."""
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        return gradient.redistribute(placements=parameter.placements)
    return gradient


def placed_like(part: Tensor, model: Tensor) -> Tensor:
    """A part as the tensor that is spread like `model`; the part itself where the model is not spread, or has another
    shape (an optimizer's count of steps)."""
    if not isinstance(model, DTensor) or part.shape != model._local_tensor.shape:
        return part
    return DTensor.from_local(
        part, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )


def whole_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The model's `state_dict` with all tensors whole, on the processor; tied ones stay one tensor.

    All ranks must call it: tensors are gathered one after the other. Empty for a rank that is not to `keep` them.
    """
    return dict(_whole(model.state_dict(keep_vars=True), keep=keep))


def _whole(state: Mapping[str, Tensor], *, keep: bool) -> Iterator[tuple[str, Tensor]]:
    made: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if id(tensor) not in made:
            with torch.no_grad():
                whole = tensor.detach()
                whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
                made[id(tensor)] = whole.cpu() if keep else whole.new_empty(0)
        if keep:
            yield name, made[id(tensor)]
