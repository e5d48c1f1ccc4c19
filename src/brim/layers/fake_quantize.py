"""A linear layer that trains through rounding: its weight is used as integers times a learned scale (LSQ).

    codes = clip(round(w / s), -Q_N, Q_P);  used = codes * s        Q_N = 2^(b-1), Q_P = 2^(b-1) - 1
    d used / d w = 1 where -Q_N < w/s < Q_P, else 0
    d used / d s = codes - w/s inside, codes (-Q_N or Q_P) outside;  times 1 / sqrt(N Q_P), N weights that share a scale

(Esser et al., Learned Step Size Quantization, arXiv:1902.08153; others count N over the whole tensor.)

How this differs from torch's `_fake_quantize_learnable_*` (FP32 alone, scales of one axis, and what merely rounds to
the last code counts as clipped) and from autograd through a straight-through estimator: product and rounding are one
function that keeps input, weight and scale; used weight and codes are made anew in backward, so that no second copy of
the weights lives between the two. Arithmetic is FP32 whatever the weights are.

A frozen weight may have a learned update of low rank, which is added before rounding: w = w0 + factor up down. So it is
gone from what is saved: the integers have it in them, as an adapter beside rounded weights would not be.

Shapes: R outputs, K inputs, S scales of a row, B weights that share one (per tensor: R = 1, S = 1); L the
update's rank.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brim.errors import RecipeError
from brim.layers.rounded_tokens import rounded_tokens
from brim.numerics.granularity import Granularity, PerGroup, PerTensor

Start = Literal["absmax", "mean", "least-squares"]
_LEAST_SCALE = 1e-8
_SHRINKS = tuple(1 - 0.05 * step for step in range(14))
_REFINEMENTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The integers of a width, and which weights share a scale."""

    bits: int
    granularity: Granularity

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def blocks(self, weight_RK: Tensor) -> Tensor:
        """A view (R, S, B) of it; per tensor (1, 1, R * K)."""
        match self.granularity:
            case PerGroup(size):
                return weight_RK.unflatten(-1, (-1, size))
            case PerTensor():
                return weight_RK.reshape(1, 1, -1)
            case _:
                return weight_RK.unsqueeze(1)

    def check(self, inputs: int) -> None:
        """Raises RecipeError where groups do not fill a row."""
        if isinstance(self.granularity, PerGroup) and inputs % self.granularity.size:
            nearest = max(size for size in range(1, self.granularity.size) if inputs % size == 0)
            raise RecipeError(
                f"qat.granularity = group:{self.granularity.size} does not divide a linear layer's {inputs} inputs; "
                f'nearest: qat.granularity = "group:{nearest}"'
            )


def first_scale(weight_RK: Tensor, grid: Grid, start: Start) -> Tensor:
    """scale_RS to begin with, FP32.

    absmax: the largest weight is the last code. mean: 2 mean|w| / sqrt(Q_P), LSQ's own. least-squares: of 14 shrinkings
    of absmax and of its opposite the one with the least squared error, refined by s = <codes, w> / <codes, codes>. A
    scale below zero turns a block around, so that its longer side has the code more that the negative side has.
    """
    blocks = grid.blocks(weight_RK.detach().float())
    sizes = blocks.abs()
    scale = 2 * sizes.mean(-1) / grid.high**0.5 if start == "mean" else sizes.amax(-1) / grid.high
    if start == "least-squares":
        scale = _least_squares(blocks, scale, grid)
    # a block of zeros: any scale will do
    return torch.where(scale.abs() > _LEAST_SCALE, scale, torch.ones_like(scale))


def _least_squares(blocks_RSB: Tensor, widest_RS: Tensor, grid: Grid) -> Tensor:
    best, least = widest_RS, _squared_error(blocks_RSB, widest_RS, grid)
    for shrink in (*_SHRINKS[1:], *(-shrink for shrink in _SHRINKS)):
        best, least = _better(blocks_RSB, widest_RS * shrink, best, least, grid)
    for _ in range(_REFINEMENTS):
        codes = _codes(blocks_RSB, best, grid)
        fitted = (codes * blocks_RSB).sum(-1) / codes.square().sum(-1).clamp(min=1)
        best, least = _better(blocks_RSB, fitted, best, least, grid)
    return best


def _better(blocks_RSB: Tensor, other: Tensor, best: Tensor, least: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    error = _squared_error(blocks_RSB, other, grid)
    return torch.where(error < least, other, best), torch.minimum(error, least)


def _squared_error(blocks_RSB: Tensor, scale_RS: Tensor, grid: Grid) -> Tensor:
    return (_codes(blocks_RSB, scale_RS, grid) * scale_RS[..., None] - blocks_RSB).square().sum(-1)


def _codes(blocks_RSB: Tensor, scale_RS: Tensor, grid: Grid) -> Tensor:
    return (blocks_RSB / _nonzero(scale_RS)[..., None]).round_().clamp_(grid.low, grid.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """A learned update of low rank."""

    rank: int
    factor: float


class FakeQuantizedLinear(nn.Linear):
    """`nn.Linear` whose weight is used rounded to `grid` with a scale that is learned beside it.

    `rounds_tokens`: its inputs are rounded, too, each token's to INT8 by its own largest. While `exact`, nothing is
    rounded (nor a learned update added).
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        grid: Grid,
        start: Start,
        update: Update | None = None,
        rounds_tokens: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        grid.check(self.in_features)
        self.grid, self.rounds_tokens = grid, rounds_tokens
        self.exact = False
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = nn.Parameter(first_scale(linear.weight, grid, start))
        self.factor = 0.0
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None
        if update is not None:
            # as PEFT begins: nothing is added yet
            self.factor = update.factor
            self.down = nn.Parameter(torch.empty_like(linear.weight[:1].expand(update.rank, -1)))
            self.up = nn.Parameter(torch.zeros_like(linear.weight[:, :1].expand(-1, update.rank)))
            nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, input: Tensor) -> Tensor:
        """In the input's format; under autocast in autocast's."""
        if self.exact:
            return F.linear(input, self.weight, self.bias)
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        result: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input.to(dtype), self.weight, self.scale, bias, self.up, self.down, self
        )
        return result

    def stored_scale(self, dtype: torch.dtype) -> Tensor:
        """scale_RS in the format that a checkpoint holds it in: the one that the product was trained with."""
        return _stored(self.scale.detach(), dtype)

    def decoded(self) -> Tensor:
        """FP32 weight_RK as a reader of the stored codes and scales will see it."""
        scale = self.stored_scale(self.weight.dtype).float()[..., None]
        return (self.grid.blocks(self.codes().float()) * scale).view(self.weight.shape)

    def codes(self) -> Tensor:
        """int8 codes_RK: with the stored scale in the weight's format they are the weight that was trained."""
        scale = self.stored_scale(self.weight.dtype).float()
        weight = _updated(self.weight.detach(), self.up, self.down, self.factor)
        return _codes(self.grid.blocks(weight), scale, self.grid).view(self.weight.shape).to(torch.int8)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _nonzero(scale).to(dtype)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale < 0, scale.clamp(max=-_LEAST_SCALE), scale.clamp(min=_LEAST_SCALE))


def _updated(weight_RK: Tensor, up_RL: Tensor | None, down_LK: Tensor | None, factor: float) -> Tensor:
    """FP32 weight_RK as it is rounded."""
    if up_RL is None or down_LK is None:
        return weight_RK.float()
    return torch.addmm(weight_RK.float(), up_RL.detach().float(), down_LK.detach().float(), alpha=factor)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight_RK: Tensor,
        scale_RS: Tensor,
        bias_R: Tensor | None,
        up_RL: Tensor | None,
        down_LK: Tensor | None,
        layer: FakeQuantizedLinear,
    ) -> Tensor:
        ctx.grid, ctx.factor, ctx.rounds_tokens = layer.grid, layer.factor, layer.rounds_tokens
        ctx.save_for_backward(input, weight_RK, scale_RS, up_RL, down_LK)
        with torch.autocast(input.device.type, enabled=False):
            weight = _updated(weight_RK, up_RL, down_LK, ctx.factor)
            used_RK, _, _ = _used(weight, _stored(scale_RS, weight_RK.dtype), ctx.grid, input.dtype, slopes=False)
            del weight
            return F.linear(rounded_tokens(input) if ctx.rounds_tokens else input, used_RK, bias_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        input, weight_RK, scale_RS, up_RL, down_LK = ctx.saved_tensors
        grid: Grid = ctx.grid
        needs_input, needs_weight, needs_scale, needs_bias, needs_update, _, _ = ctx.needs_input_grad
        needs_any = needs_weight or needs_scale or needs_update
        weight = _updated(weight_RK, up_RL, down_LK, ctx.factor)
        used_RK, slope, outside = _used(weight, _stored(scale_RS, weight_RK.dtype), grid, grad.dtype, slopes=needs_any)
        del weight
        grad_input = grad @ used_RK if needs_input else None
        del used_RK
        grad_weight = grad_scale = grad_up = grad_down = None
        if needs_any:
            seen = rounded_tokens(input) if ctx.rounds_tokens else input
            through = grid.blocks((grad.flatten(0, -2).T @ seen.flatten(0, -2)).float())
            del seen
            if needs_scale:
                grad_scale = (through * slope).sum(-1) / (slope.shape[-1] * grid.high) ** 0.5
            through = through.masked_fill_(outside, 0).view(weight_RK.shape)
            if needs_update:
                grad_up = (through @ down_LK.float().T).mul_(ctx.factor).to(up_RL.dtype)
                grad_down = (up_RL.float().T @ through).mul_(ctx.factor).to(down_LK.dtype)
            if needs_weight:
                grad_weight = through.to(weight_RK.dtype)
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        return grad_input, grad_weight, grad_scale, grad_bias, grad_up, grad_down, None


def _used(
    weight_RK: Tensor, scale_RS: Tensor, grid: Grid, dtype: torch.dtype, *, slopes: bool
) -> tuple[Tensor, Any, Any]:
    """(used weight_RK in `dtype`; its derivative by the scale, and where it has none by the weight, as (R, S, B)).

    The weight is FP32; the scale in the format that a checkpoint will hold it in.
    """
    scale = scale_RS.float()[..., None]
    ratio = grid.blocks(weight_RK) / scale
    codes = ratio.round().clamp_(grid.low, grid.high)
    used_RK = (codes * scale).view(weight_RK.shape).to(dtype)
    if not slopes:
        return used_RK, None, None
    outside = (ratio <= grid.low) | (ratio >= grid.high)
    return used_RK, codes.sub_(ratio.masked_fill_(outside, 0)), outside
