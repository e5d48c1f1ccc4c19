"""An embedding whose rows stay in 8 bits, with a scale for each row or group; those asked for are made anew.

Shapes: V rows, H hidden size, S scales of a row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brim.layers.packed_linear import PackedLinear
from brim.layers.packing import Int8

_BY_ROW = Int8()


class PackedEmbedding(nn.Module):
    """In the place of a plain `nn.Embedding`. A head that shares its weight takes the same codes and scales (`tie`)."""

    is_stored_packed = False
    """As a packed linear layer's."""
    _is_hf_initialized: bool

    def __init__(
        self, rows: int, hidden: int, *, compute: torch.dtype, device: torch.device, packing: Int8 = _BY_ROW
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.compute, self.packing = rows, hidden, compute, packing
        for name, (shape, dtype) in packing.layout(rows, hidden, compute).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

    def packed(self, weight_VH: Tensor) -> dict[str, Tensor]:
        """What holds this weight."""
        return dict(self.packing.pack(weight_VH.to(self.compute)))

    def pack(self, weight_VH: Tensor) -> None:
        """Hold this weight from now on."""
        for name, tensor in self.packed(weight_VH).items():
            setattr(self, name, tensor)

    def forward(self, input: Tensor) -> Tensor:
        """The rows of these numbers, in the compute format."""
        buffers: Any = self._buffers
        rows, scale = F.embedding(input, buffers["weight"]).to(self.compute), F.embedding(input, buffers["scale"])
        return (rows.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def tie(head: PackedLinear, embedding: PackedEmbedding) -> None:
    """The head holds what the embedding holds."""
    for name in ("weight", "scale"):
        setattr(head, name, embedding._buffers[name])
