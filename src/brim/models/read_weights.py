"""Linear layers whose weight a model's code takes for itself and which it never calls (Mamba's `dt_proj`).

Such a weight must be a matrix of numbers: packed codes in its place would be multiplied as if they were numbers. Looked
for in the byte code of the module that has the layer: `self.NAME.weight` without a `self.NAME(...)`. A layer that is
called as well is called here: the other path is a kernel's, or one that a setting opens.
"""

import dis
from collections.abc import Iterator
from functools import cache
from inspect import unwrap
from itertools import pairwise
from types import FunctionType

from torch import nn


def read_linears(model: nn.Module) -> Iterator[str]:
    """Names of the linear layers whose weight the module around them reads."""
    for name, module in model.named_modules():
        for child in _read_by(type(module)):  # type: ignore[arg-type]  # a class can be hashed
            if isinstance(module._modules.get(child), nn.Linear):
                yield f"{name}.{child}" if name else child


@cache
def _read_by(kind: type[nn.Module]) -> frozenset[str]:
    """Names of children whose `weight` this class's own functions read, and which they do not call."""
    read, called = set[str](), set[str]()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for function in vars(base).values():
            if isinstance(function, FunctionType) and function.__name__ != "__init__":
                instructions = list(dis.get_instructions(unwrap(function)))
                called |= {one.argval for one in instructions if one.opname == "LOAD_METHOD"}
                read |= {
                    child.argval
                    for child, weight in pairwise(instructions)
                    if child.opname == weight.opname == "LOAD_ATTR" and weight.argval == "weight"
                }
    return frozenset(read - called)
