"""An embedding whose rows stay in 8 bits, each with its scale; those asked for are made anew. V rows, H hidden size."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brim.layers.packed_linear import PackedLinear
from brim.layers.packing import Int8

PACKING = Int8()


class PackedEmbedding(nn.Module):
    """In the place of a plain `nn.Embedding`. A head that shares its weight takes the same codes and scales (`tie`)."""

    is_stored_packed = False
    _is_hf_initialized: bool

    def __init__(self, rows: int, hidden: int, *, compute: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.out_features, self.in_features, self.compute = rows, hidden, compute
        for name, (shape, dtype) in PACKING.layout(rows, hidden, compute).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

    def packed(self, weight_VH: Tensor) -> dict[str, Tensor]:
        """What holds this weight."""
        return dict(PACKING.pack(weight_VH.to(self.compute)))

    def pack(self, weight_VH: Tensor) -> None:
        """Hold this weight from now on."""
        for name, tensor in self.packed(weight_VH).items():
            setattr(self, name, tensor)

    def forward(self, input: Tensor) -> Tensor:
        """The rows of these numbers, in the compute format."""
        buffers: Any = self._buffers
        return F.embedding(input, buffers["weight"]).to(self.compute) * F.embedding(input, buffers["scale"])


def tie(head: PackedLinear, embedding: PackedEmbedding) -> None:
    """The head holds what the embedding holds."""
    for name in ("weight", "scale"):
        setattr(head, name, embedding._buffers[name])
