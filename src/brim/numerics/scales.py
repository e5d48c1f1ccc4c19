"""Scales that miss least: searched over blocks, where absmax only makes the largest element fit.

A scale that lets a few large elements be clipped makes the grid finer for all others. The error has no closed form in
the scale, since codes are rounded. With the codes q of weights w held fixed it has one: with P = sum(i q^2) and
C = sum(i w q), i being the importance of an element, scale s errs by s^2 P - 2 s C + sum(i w^2), least at C / P.
So the search tries absmax shrunk by each of some factors, fits a scale to the codes of each, and keeps the one that
misses least. Shapes: B elements that share a scale; leading dimensions are free.
"""

import torch
from torch import Tensor

from brim.numerics.encode import storable_scale

SHRINKS = tuple(1.0 - step / 24 for step in range(15))
"""From absmax itself down to 0.42 of it: below that more is clipped than any finer grid wins back."""
_ELEMENTS = 2**16
"""Looked at together, so that what is looked at again and again stays in the processor's cache."""


def least_error_scale(
    blocks: Tensor, *, codes: tuple[int, int], dtype: torch.dtype, importance: Tensor | None = None
) -> Tensor:
    """(..., B) -> (..., 1): of the scales tried, the one with the least sum of importance times squared error.

    `importance` broadcasts to the blocks (None: all alike). Absmax is among those tried, so the result is never worse.
    """
    if blocks.dim() == 1:
        return least_error_scale(blocks[None], codes=codes, dtype=dtype, importance=importance)[0]
    if not blocks.numel():
        return torch.ones(*blocks.shape[:-1], 1, dtype=dtype)
    rows = max(1, _ELEMENTS // (blocks.numel() // len(blocks)))
    weight = torch.ones(1, dtype=blocks.dtype) if importance is None else importance
    weight = weight.expand_as(blocks)
    parts = zip(blocks.split(rows), weight.split(rows), strict=True)
    return torch.cat([_search(part, shared, *codes, dtype) for part, shared in parts])


def _search(blocks: Tensor, weight: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    absmax = blocks.abs().amax(dim=-1, keepdim=True) / high
    plain = storable_scale(absmax, largest_code=-low, dtype=dtype)
    best, least = plain, torch.full_like(absmax, torch.inf)
    weighted = blocks * weight
    for shrink in SHRINKS:
        rounded = _codes(blocks, absmax.clamp_min(torch.finfo(absmax.dtype).tiny) * shrink, low, high)
        fit = (rounded * weighted).sum(dim=-1, keepdim=True)
        power = rounded.square_().mul_(weight).sum(dim=-1, keepdim=True)
        fitted = torch.where((power > 0) & (fit > 0), fit / power, absmax * shrink)
        scale = storable_scale(fitted, largest_code=-low, dtype=dtype)
        # Without sum(i w^2), which is the same for all scales.
        error = scale.float() * (scale.float() * power - 2 * fit)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    # The sums above lose digits, and codes nearest to the fitted scale were not looked at: so these two once more.
    worse = _error(blocks, best.float(), weight, low, high) > _error(blocks, plain.float(), weight, low, high)
    return torch.where(worse, plain, best)


def _codes(blocks: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (blocks / scale).round_().clamp_(low, high)


def _error(blocks: Tensor, scale: Tensor, weight: Tensor, low: int, high: int) -> Tensor:
    return (_codes(blocks, scale, low, high) * scale).sub_(blocks).square_().mul_(weight).sum(dim=-1, keepdim=True)
