"""FSDP2's parts of weights that lie on the host (its `CPUOffloadPolicy`): copied to the device to be gathered, their
gradients copied back.

FSDP asks for these copies with `Tensor.to`, which does nothing where device and host are one memory: on a processor,
and for the fake tensors of a rehearsal. Here they are made always, so that what is rehearsed for a GPU is what is run.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ShardedState
from torch.distributed.tensor import DTensor

from brim.memory import owners


class PartAtHome(FSDPParam):
    """A parameter of FSDP's whose part is in the host's memory."""

    @property
    def all_gather_inputs(self) -> list[Tensor]:
        if self.device.type != "cpu" or self.sharded_state != ShardedState.SHARDED:
            return super().all_gather_inputs
        with torch.no_grad(), owners.on_device():
            here = torch.empty_like(self._sharded_param_data).copy_(self._sharded_param_data)
            return [here if self.param_dtype is None else here.to(self.param_dtype)]

    def to_sharded_dtensor(self, tensor: Tensor) -> DTensor:
        """Of a gradient: what has come out of the sum over ranks."""
        if self.device.type == "cpu":
            with torch.no_grad(), owners.on_host():
                tensor = torch.empty_like(tensor).copy_(tensor)
        return super().to_sharded_dtensor(tensor)


def keep_parts_at_home(module: FSDPModule) -> None:
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for parameter in group.fsdp_params:
            parameter.__class__ = PartAtHome


def bring_buffers(root: nn.Module, device: torch.device) -> None:
    """FSDP gathers parameters; what else a module has is on the device for good."""
    for buffer in root.buffers():
        with torch.no_grad(), owners.on_device(), owners.inside("weights"):
            buffer.data = torch.empty_like(buffer, device=device).copy_(buffer)
