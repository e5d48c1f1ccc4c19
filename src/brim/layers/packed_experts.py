"""The experts of a mixture whose frozen matrices stay packed, each unpacked when the tokens sent to it come by.

transformers 5 holds a layer's experts as two parameters, `gate_up_proj` (E, 2I, H) and `down_proj` (E, H, I). Here each
expert's gate, up and down are packed by themselves, as bitsandbytes and GPTQ pack them where each is a linear layer of
its own; only their codes and scales lie side by side. The forward pass is the library's own loop over the experts that
are hit, in three products: one unpacked matrix is alive at a time, in the backward pass too.

The grouped matmul, which the library prefers, wants all experts' weights at once in 16 bits: what packing is to avoid.

Shapes: E experts, M matrices of one parameter (gate and up, or down alone), T tokens, P places each is sent to,
N tokens sent to one expert, H hidden, I intermediate; R outputs, K inputs of a matrix.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brim.layers.packed_linear import codes_to_parameters, packed_product
from brim.layers.packing import Packing, Tensors

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_GATE, _UP = 0, 1


class PackedExperts(nn.Module):
    """In the place of an experts module whose two parameters have the shapes above.

    Codes are in buffers of the parameters' names, (E, M, *their shape), the rest in `NAME_absmax` and so on. Not made
    of linear layers: PEFT, which would adapt those, leaves experts alone, as it does where they are not packed.
    """

    _is_hf_initialized: bool
    """transformers' mark: its initializers, which want floats, keep away."""
    multiplies_whole: bool = False
    """As `PackedLinear`'s."""

    def __init__(
        self,
        *,
        num_experts: int,
        hidden: int,
        intermediate: int,
        act_fn: Callable[[Tensor], Tensor],
        packing: Packing,
        compute: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.num_experts, self.act_fn = num_experts, act_fn
        self.packing, self.compute = packing, compute
        self.shapes = {GATE_UP: (2, intermediate, hidden), DOWN: (1, hidden, intermediate)}
        """Name -> (M, R, K)."""
        for name in self.shapes:
            for buffer, tensor in self._empty(name, device).items():
                self.register_buffer(buffer, tensor)

    def _empty(self, name: str, device: torch.device) -> dict[str, Tensor]:
        matrices, rows, inputs = self.shapes[name]
        layout = self.packing.layout(rows, inputs, self.compute)
        return {
            _buffer(name, key): torch.empty(self.num_experts, matrices, *shape, dtype=dtype, device=device)
            for key, (shape, dtype) in layout.items()
        }

    def packed(self, name: str, weights: Iterable[tuple[int, int, Tensor]]) -> dict[str, Tensor]:
        """Buffers that hold these (expert, matrix, weight_RK), all of a parameter's; they are asked for one by one."""
        made: dict[str, Tensor] = {}
        for expert, matrix, weight_RK in weights:
            made = made or self._empty(name, weight_RK.device)
            for key, tensor in self.packing.pack(weight_RK.to(self.compute).contiguous()).items():
                made[_buffer(name, key)][expert, matrix] = tensor
        return made

    def fill(self, *, std: float) -> None:
        """Random weights, for all experts the same: rehearsals alone ask for them, and packing each takes minutes."""
        for name, (_, rows, inputs) in self.shapes.items():
            weight_RK = torch.empty(rows, inputs, dtype=self.compute).normal_(std=std)
            for key, tensor in self.packing.pack(weight_RK).items():
                self._buffers[_buffer(name, key)].copy_(tensor)  # type: ignore[union-attr]  # none of ours is None

    def make_codes_divisible(self) -> None:
        """As a packed linear layer's."""
        codes_to_parameters(self, (GATE_UP, DOWN))

    def matrix(self, name: str, expert: int, matrix: int) -> "PackedMatrix":
        _, rows, inputs = self.shapes[name]
        keys = self.packing.layout(rows, inputs, self.compute)
        held = {key: getattr(self, _buffer(name, key))[expert, matrix] for key in keys}
        return PackedMatrix(
            held=held, out_features=rows, in_features=inputs, packing=self.packing, compute=self.compute
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `MixtralExperts.forward` and its kin: (T, H), (T, P) and (T, P) -> (T, H)."""
        result_TH = torch.zeros_like(hidden_states)
        for expert, place_N, token_N in routes(top_k_index, self.num_experts):
            output_NH = self._expert(hidden_states[token_N], expert) * top_k_weights[token_N, place_N, None]
            result_TH.index_add_(0, token_N, output_NH.to(result_TH.dtype))
        return result_TH

    def _expert(self, input_NH: Tensor, expert: int) -> Tensor:
        def product(input: Tensor, name: str, matrix: int) -> Tensor:
            return packed_product(
                input, None, self.matrix(name, expert, matrix), compute=self.compute, whole=self.multiplies_whole
            )

        inner_NI = self.act_fn(product(input_NH, GATE_UP, _GATE)) * product(input_NH, GATE_UP, _UP)
        return product(inner_NI, DOWN, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """One expert's gate, up or down: views of the experts' buffers."""

    held: Tensors
    out_features: int
    in_features: int
    packing: Packing
    compute: torch.dtype

    def unpacked(self) -> Tensor:
        return self.packing.unpack(self.held, self.out_features, self.in_features, self.compute)


def routes(top_k_index: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, place_N, token_N) of each expert that is hit. Reads numbers: `memory.fake` has another for fake tensors.

    An index past the last expert is sent nowhere, as in the library.
    """
    hit_ETP = F.one_hot(top_k_index, num_classes=num_experts + 1).permute(2, 0, 1)
    for expert in range(num_experts):
        token_N, place_N = torch.where(hit_ETP[expert])
        if len(token_N):
            yield expert, place_N, token_N


def _buffer(name: str, key: str) -> str:
    return name if key == "weight" else f"{name}_{key}"
