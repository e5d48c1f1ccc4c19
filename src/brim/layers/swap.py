"""One walk over a model that puts other modules in the place of some."""

from collections.abc import Callable

from torch import nn


def swap(model: nn.Module, *, match: Callable[[str, nn.Module], bool], make: Callable[[nn.Module], nn.Module]) -> int:
    """Replace each module that matches (its name and itself are asked) by what `make` makes of it; how many there were.

    A module that has two places in the model keeps them both. Raises nothing of its own.
    """
    made: dict[int, nn.Module] = {}
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if match(f"{parent_name}.{name}".lstrip("."), child):
                made.setdefault(id(child), make(child))
                setattr(parent, name, made[id(child)])
    return len(made)
