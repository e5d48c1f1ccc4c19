"""AdamW over states of 8 bits, as bitsandbytes holds them: a code an element, the largest of 256 as their scale.

On CUDA the update is bitsandbytes' kernel. Its CPU form makes six FP32 copies of the whole parameter while it steps,
and finds codes by a table whose cells are 3e-5 wide, so that what is smaller than that beside the largest of its block
gets any of some ten codes. Here a part of the parameter is stepped at a time, and every code is the nearest
(`nearest_codes`), as in its CUDA kernel. Dettmers et al. 2021, arXiv 2110.02861. Shapes: N elements, A blocks of 256.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from brim.layers.nearest_code import SIGNED, UNSIGNED, nearest_codes, table_of
from brim.layers.stochastic_rounding import noise_like, round_by_chance

BLOCK = 256
SMALLEST = 4096
"""Elements; smaller parameters keep FP32 states: norms and biases, which are few and sensitive."""
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_LEAST_AT_ONCE = 2**18
_MOST_PARTS = 16
"""Parts that a parameter is stepped in at most: its temporaries are then about 1 byte an element."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Maps:
    """The 256 numbers that codes stand for; one pair for all parameters."""

    signed: Tensor
    """Of the first moment."""
    unsigned: Tensor
    """Of the second."""
    tables: tuple[Tensor, ...]
    """Of `nearest_codes`: of the first and of the second."""

    @classmethod
    def on(cls, device: torch.device) -> "Maps":
        """Made from numbers: fake in a rehearsal and real in a run."""
        tables = (table_of(SIGNED), table_of(UNSIGNED))
        return cls(
            signed=torch.tensor(SIGNED, device=device),
            unsigned=torch.tensor(UNSIGNED, device=device),
            tables=tuple(torch.tensor(table, dtype=torch.int32, device=device) for table in tables),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.signed, self.unsigned, *self.tables)


def new_state(parameter: Tensor, *, device: torch.device | None = None) -> dict[str, Tensor]:
    """Moments of zero, by bitsandbytes' names; beside the parameter, or on `device`."""
    where = device or parameter.device
    small = parameter.numel() < SMALLEST
    dtype = torch.float32 if small else torch.uint8
    state = {name: torch.zeros(parameter.shape, dtype=dtype, device=where) for name in ("state1", "state2")}
    if not small:
        blocks = ceil(parameter.numel() / BLOCK)
        state |= {name: torch.zeros(blocks, device=where) for name in ("absmax1", "absmax2")}
    return state


def has_kernel(device: torch.device) -> bool:
    """Whether the whole update is one kernel, without temporaries."""
    return device.type == "cuda"


def adam_update(
    parameter: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    maps: Maps,
    *,
    step: int,
    rate: float,
    decay: float,
    by_chance: bool = False,
) -> None:
    """Step number `step` (from 1) of decoupled AdamW, in place; `state` is that of `new_state`.

    `by_chance`: BF16 weights are rounded stochastically, which the kernel cannot.
    """
    flat_N, gradient_N = parameter.detach().view(-1), gradient.contiguous().view(-1)
    tensors = {name: tensor.view(-1) for name, tensor in state.items()}
    if has_kernel(parameter.device) and not by_chance:
        _by_kernel(flat_N, gradient_N, tensors, maps, step=step, rate=rate, decay=decay)
        return
    size = max(_LEAST_AT_ONCE, ceil(flat_N.numel() / _MOST_PARTS / BLOCK) * BLOCK)
    for start in range(0, flat_N.numel(), size):
        part, blocks = slice(start, start + size), slice(start // BLOCK, ceil((start + size) / BLOCK))
        own = {name: tensor[blocks if name.startswith("absmax") else part] for name, tensor in tensors.items()}
        _by_operators(flat_N[part], gradient_N[part], own, maps, step=step, rate=rate, decay=decay, by_chance=by_chance)


def _by_operators(
    flat_N: Tensor,
    gradient_N: Tensor,
    state: dict[str, Tensor],
    maps: Maps,
    *,
    step: int,
    rate: float,
    decay: float,
    by_chance: bool,
) -> None:
    """What bitsandbytes' kernels do: decode, torch's AdamW in FP32, encode."""
    first_N, second_N = _decoded(state, 1, maps.signed), _decoded(state, 2, maps.unsigned)
    weight_N = flat_N.float()
    torch._fused_adamw_(
        [weight_N], [gradient_N.float()], [first_N], [second_N], [],
        [torch.full((), step, dtype=torch.float32, device=flat_N.device)],
        lr=rate, beta1=_BETAS[0], beta2=_BETAS[1], weight_decay=decay, eps=_EPSILON, amsgrad=False, maximize=False,
    )  # fmt: skip
    if weight_N.dtype != flat_N.dtype:
        flat_N.copy_(round_by_chance(weight_N, noise_like(weight_N)) if by_chance else weight_N)
    del weight_N
    _encode(first_N, state, 1, maps)
    del first_N
    _encode(second_N, state, 2, maps)


def _decoded(state: dict[str, Tensor], number: int, code: Tensor) -> Tensor:
    """A moment in FP32; the state itself where it is kept so."""
    stored = state[f"state{number}"]
    if stored.dtype == torch.float32:
        return stored
    decoded: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        stored, state[f"absmax{number}"], code, BLOCK, torch.float32
    )
    return decoded


def _encode(moment_N: Tensor, state: dict[str, Tensor], number: int, maps: Maps) -> None:
    """Into the state; writes over `moment_N`."""
    stored = state[f"state{number}"]
    if stored.dtype == torch.float32:
        return  # it was updated in place
    absmax_A = state[f"absmax{number}"]
    whole = moment_N.numel() // BLOCK
    for blocks, elements in ((slice(whole), slice(whole * BLOCK)), (slice(whole, None), slice(whole * BLOCK, None))):
        part = moment_N[elements]
        if part.numel():
            rows = part.view(-1, min(part.numel(), BLOCK))  # the last block of a parameter may be shorter
            torch.amax(rows.abs(), dim=1, out=absmax_A[blocks])
            rows.div_(absmax_A[blocks, None])
    stored.copy_(nearest_codes(moment_N, maps.tables[number - 1]))


def _by_kernel(
    flat_N: Tensor, gradient_N: Tensor, state: dict[str, Tensor], maps: Maps, *, step: int, rate: float, decay: float
) -> None:
    """bitsandbytes calls it `adam`; its decay is AdamW's. Zeros stand for what other optimizers of its use."""
    first, second, (beta1, beta2) = state["state1"], state["state2"], _BETAS
    if first.dtype == torch.float32:
        torch.ops.bitsandbytes.optimizer_update_32bit(
            "adam", gradient_N, flat_N, first, second, None, 0.0, 0.0, beta1, beta2, 0.0, 0.0,
            _EPSILON, decay, step, rate, 1.0, False,
        )  # fmt: skip
        return
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam", gradient_N, flat_N, first, second, beta1, beta2, 0.0, 0.0, _EPSILON, step, rate,
        maps.signed, maps.unsigned, state["absmax1"], state["absmax2"], decay, 1.0, False,
    )  # fmt: skip
