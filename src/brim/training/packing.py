"""Several whole examples in one row, none seeing another: no padding, and no text cut in two but the longest.

Positions begin anew with each example, by which transformers makes a mask of one block an example. Every row has the
recipe's length, so every step takes the memory that was predicted; the order of batches does not matter to it.
"""

import inspect
from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brim.errors import RecipeError
from brim.layers.chunked_loss import IGNORED


def fill_rows(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Indices of the examples in each row: the longest first, each where it leaves the least room (best fit)."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    """(what is left, index of the row), sorted."""
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            rows.append([])
            left, chosen = row, len(rows) - 1
        else:
            left, chosen = room.pop(place)
        rows[chosen].append(index)
        insort(room, (left - lengths[index], chosen))
    return rows


def pack(examples: Sequence[list[int]], row: int, *, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, labels, position_ids), each RT, of examples that have at least two tokens.

    An example longer than a row is cut. What a row has left is filled with padding that has no labels.
    """
    pieces = [example[start : start + row + 1] for example in examples for start in range(0, len(example) - 1, row)]
    inputs, labels, positions = [], [], []
    for chosen in fill_rows([len(piece) - 1 for piece in pieces], row):
        missing = row - sum(len(pieces[index]) - 1 for index in chosen)
        inputs.append([token for index in chosen for token in pieces[index][:-1]] + [padding] * missing)
        labels.append([token for index in chosen for token in pieces[index][1:]] + [IGNORED] * missing)
        positions.append([p for index in chosen for p in range(len(pieces[index]) - 1)] + list(range(missing)))
    return torch.tensor(inputs), torch.tensor(labels), torch.tensor(positions)


def halves(rows: int, length: int) -> Tensor:
    """position_ids of rows that hold two examples each."""
    first = length // 2
    return torch.cat([torch.arange(first), torch.arange(length - first)]).repeat(rows, 1)


def check_takes_positions(model: nn.Module) -> None:
    """Raises RecipeError for a model that cannot be told where an example begins."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise RecipeError(
            f"training.packing = true cannot run: {type(model).__name__} takes no positions, so an example would see "
            "those before it; nearest: training.packing = false"
        )


def check_apart(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Raises RecipeError when an example's logits depend on the one before it in its row. `input_ids`: 1T."""
    input_ids = inputs["input_ids"]
    positions = halves(1, input_ids.shape[1]).to(input_ids.device)
    second = input_ids.shape[1] // 2
    model.eval()
    with torch.no_grad():
        packed_TV = model(input_ids=input_ids, position_ids=positions).logits[0, second:]
        alone_TV = model(input_ids=input_ids[:, second:]).logits[0]
    model.train()
    if not torch.allclose(packed_TV.float(), alone_TV.float(), rtol=1e-2, atol=1e-2):
        raise RecipeError(
            f"training.packing = true cannot run: in {type(model).__name__} an example sees those before it in its "
            "row; nearest: training.packing = false"
        )
