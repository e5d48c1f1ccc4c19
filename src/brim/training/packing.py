"""Several whole examples in one row, none seeing another: no padding, and no text cut in two but the longest.

Positions begin anew with each example, by which transformers makes a mask of one block an example. Every row has the
recipe's length, so every step takes the memory that was predicted; the order of batches does not matter to it.
"""

import inspect
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brim.errors import RecipeError
from brim.layers.chunked_loss import IGNORED
from brim.training.examples import Example


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


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of equal length, each of whole examples."""

    input_ids: Tensor
    """RT."""
    labels: Tensor
    """RT."""
    position_ids: Tensor
    """RT, counted anew in each example."""
    origins: tuple[tuple[int, ...], ...]
    """Of each row, the examples in it."""


def pack(examples: Sequence[Example], row: int, *, padding: int) -> PackedRows:
    """Rows of examples, in which something is learned.

    An example longer than a row is cut, and a piece of which nothing is learned is left out. What a row has left is
    filled with padding that has no labels.
    """
    pieces = [
        (index, example.ids[start : start + row + 1], example.learned[start + 1 : start + row + 1])
        for index, example in enumerate(examples)
        for start in range(0, len(example.ids) - 1, row)
        if any(example.learned[start + 1 : start + row + 1])
    ]
    inputs, labels, positions, origins = [], [], [], []
    for chosen in fill_rows([len(learned) for _, _, learned in pieces], row):
        parts = [pieces[number] for number in chosen]
        missing = row - sum(len(learned) for _, _, learned in parts)
        inputs.append([token for _, ids, _ in parts for token in ids[:-1]] + [padding] * missing)
        labels.append([token for _, ids, learned in parts for token in targets(ids[1:], learned)] + [IGNORED] * missing)
        positions.append([p for _, _, learned in parts for p in range(len(learned))] + list(range(missing)))
        origins.append(tuple(index for index, _, _ in parts))
    return PackedRows(torch.tensor(inputs), torch.tensor(labels), torch.tensor(positions), tuple(origins))


def targets(ids: Sequence[int], learned: Sequence[bool]) -> list[int]:
    """The tokens as labels; -100 where they are not learned."""
    return [token if wanted else IGNORED for token, wanted in zip(ids, learned, strict=True)]


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
