"""Scales that miss least: searched over blocks, where absmax only makes the largest element fit.

A scale that lets a few large elements be clipped makes the grid finer for all others. The error has no closed form in
the scale, since codes are rounded; with the codes held fixed it has: sum(i w q) / sum(i q^2) (a weighted least squares
fit, i the importance of an element). So the search tries absmax shrunk by each of some factors, fits the scale to the
codes of each, and keeps what misses least. Shapes: B elements that share a scale; leading dimensions are free.
"""

import torch
from torch import Tensor

from brim.numerics.encode import storable_scale

SHRINKS = tuple(1.0 - step / 40 for step in range(25))
"""From absmax itself down to 0.4 of it: below that more is clipped than any finer grid wins back."""


def least_error_scale(
    blocks: Tensor, *, codes: tuple[int, int], dtype: torch.dtype, importance: Tensor | None = None
) -> Tensor:
    """(..., B) -> (..., 1): of the scales tried, the one with the least sum of importance times squared error.

    `importance` broadcasts to the blocks (None: all alike). Absmax is among those tried, so the result is never worse.
    """
    low, high = codes
    weight = torch.ones_like(blocks) if importance is None else importance.expand_as(blocks)
    absmax = blocks.abs().amax(dim=-1, keepdim=True) / high
    best = storable_scale(absmax, largest_code=-low, dtype=dtype)
    least = _error(blocks, _codes(blocks, best.float(), low, high), best.float(), weight)
    for shrink in SHRINKS:
        tried = storable_scale(absmax * shrink, largest_code=-low, dtype=dtype)
        rounded = _codes(blocks, tried.float(), low, high)
        fitted = _fitted(blocks, rounded, weight, otherwise=tried)
        for scale in (tried, storable_scale(fitted, largest_code=-low, dtype=dtype)):
            rounded = _codes(blocks, scale.float(), low, high)
            error = _error(blocks, rounded, scale.float(), weight)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _codes(blocks: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (blocks / scale).round_().clamp_(low, high)


def _error(blocks: Tensor, rounded: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return (rounded * scale).sub_(blocks).square_().mul_(weight).sum(dim=-1, keepdim=True)


def _fitted(blocks: Tensor, rounded: Tensor, weight: Tensor, *, otherwise: Tensor) -> Tensor:
    """Least squares with the codes held; the scale that made them where no code, or no importance, is left."""
    weighted = rounded * weight
    power = (weighted * rounded).sum(dim=-1, keepdim=True)
    scale = (weighted * blocks).sum(dim=-1, keepdim=True) / power
    return torch.where((power > 0) & (scale > 0), scale, otherwise.float())
