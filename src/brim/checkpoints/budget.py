"""`cheapest`: of several formats for each tensor, those with the least error in all within a size.

A multiple-choice knapsack, solved by dynamic programming over sizes in units of their greatest common divisor: exact
wherever that leaves at most 65,536 of them; else sizes are rounded up to that many, and the budget is still kept.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brim.errors import DoesNotFitError
from brim.units import format_bytes

MOST_CELLS = 2**16


class Choice(NamedTuple):
    """One way of storing one tensor."""

    nbytes: int
    error: float


def cheapest(tensors: Sequence[Sequence[Choice]], *, budget_bytes: int) -> tuple[int, ...]:
    """For each tensor the number of its choice: least error in all, in no more than `budget_bytes`.

    Raises DoesNotFitError where even the smallest take more.
    """
    least_bytes = sum(min(choice.nbytes for choice in choices) for choices in tensors)
    if least_bytes > budget_bytes:
        raise DoesNotFitError(
            f"a budget of {format_bytes(budget_bytes)} is less than the smallest formats take, "
            f"{format_bytes(least_bytes)}: {format_bytes(least_bytes - budget_bytes)} are missing; allow more"
        )
    # Only what a tensor takes beyond its smallest choice is to be shared out.
    extra = [[choice.nbytes - min(c.nbytes for c in choices) for choice in choices] for choices in tensors]
    most = sum(max(row) for row in extra)
    spare = min(budget_bytes - least_bytes, most)
    unit = max(math.gcd(*(nbytes for row in extra for nbytes in row)), -(-spare // MOST_CELLS), 1)
    cells = spare // unit
    # error[b]: of the tensors so far, the least in at most b units.
    error: NDArray[np.float64] = np.zeros(cells + 1)
    chosen = np.zeros((len(tensors), cells + 1), dtype=np.int16)
    for tensor, choices in enumerate(tensors):
        best = np.full(cells + 1, np.inf)
        for number, choice in enumerate(choices):
            units = -(-extra[tensor][number] // unit)
            if units > cells:
                continue
            tried = np.full(cells + 1, np.inf)
            tried[units:] = error[: cells + 1 - units] + choice.error
            better = tried < best
            best[better], chosen[tensor, better] = tried[better], number
        error = best
    left, found = cells, list[int]()
    for tensor in reversed(range(len(tensors))):
        found.append(int(chosen[tensor, left]))
        left -= -(-extra[tensor][found[-1]] // unit)
    return tuple(reversed(found))
