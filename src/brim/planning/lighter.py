"""What to run instead of a recipe that ran out of memory: as many rows a step and the same arithmetic, in less."""

from collections.abc import Callable, Iterator, Sequence

from brim.errors import RecipeError
from brim.hardware.device import Device
from brim.planning.advice import fixed, smaller_micro_batch
from brim.recipe import Recipe

_LEVERS: tuple[Callable[[Recipe, Device], Sequence[str]], ...] = (
    smaller_micro_batch,
    fixed("memory.loss=chunked"),
    fixed("memory.activation_checkpointing=full"),
)
"""None changes what is learned; the first costs least time."""


def lighter(recipe: Recipe, device: Device) -> Iterator[Recipe]:
    """Recipes with one lever more, the fastest first; none where all are pulled."""
    for lever in _LEVERS:
        try:
            changed = recipe.with_settings(lever(recipe, device))
        except RecipeError:
            continue
        if changed != recipe:
            yield changed
