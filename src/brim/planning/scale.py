"""Recipes weighed against each other by the most that their peaks may turn out to be. By closed form. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from brim.errors import UsageError
from brim.hardware.device import Device
from brim.memory.bands import DEFAULT_RISK
from brim.models.spec import ModelSpec
from brim.planning.candidates import kinds
from brim.planning.constraints import Constraints
from brim.planning.estimate import closed_form_band, estimate, published_band
from brim.planning.sweep import Sweep, with_batch
from brim.recipe import Recipe
from brim.report import Prediction


class Scale:
    """For one model on one device."""

    def __init__(self, spec: ModelSpec, device: Device, risk: float = DEFAULT_RISK) -> None:
        self._spec, self._device, self._risk = spec, device, risk
        self._sweep = Sweep(spec, device)

    def upper_bytes(self, recipe: Recipe) -> int:
        """The most that the peak may turn out to be: `upper_bound` of its estimate."""
        _, high = closed_form_band(self._spec, recipe)
        _, most = published_band(self._spec, recipe, self._device, self._risk)
        batch = recipe.micro_batch_size, recipe.grad_accumulation
        return int(self._sweep.numbers(recipe, [batch])[0].peak_bytes * ((1 + high) * (1 + most))) + 1

    def lightest(self, recipes: Iterable[Recipe]) -> Recipe:
        return min(recipes, key=self.upper_bytes)

    def largest(
        self, recipes: Sequence[Recipe], changed: Callable[[Recipe, int], Recipe], *, most: int, budget_bytes: int
    ) -> tuple[int, Recipe] | None:
        """The largest number up to `most` with which a recipe fits, and the lightest of those that do.

        What does not fit with one number fits with no larger one, so fewer and fewer recipes are weighed.
        """
        low, high, left = 0, most + 1, list(recipes)
        while high - low > 1:
            middle = min(2 * low or 1, (low + high) // 2)
            fitting = [each for each in left if self.upper_bytes(changed(each, middle)) <= budget_bytes]
            low, high, left = (middle, high, fitting) if fitting else (low, middle, left)
        return (low, self.lightest([changed(each, low) for each in left])) if low else None

    def prediction(self, recipe: Recipe, budget_bytes: int) -> Prediction:
        return estimate(self._spec, recipe, device=self._device, budget_bytes=budget_bytes, risk=self._risk)


def considered(spec: ModelSpec, device: Device, constraints: Constraints) -> list[Recipe]:
    """Recipes on so many of a device as the constraints say; where the batch is open, one row at a time.

    None where no recipe goes with the constraints: more devices than rows, say.
    """
    if constraints.global_batch_size is None and "micro_batch_size" not in constraints.pinned:
        constraints = replace(constraints, settings=(*constraints.settings, "micro_batch_size=1"))
    try:
        return [with_batch(kind, batch) for kind, batches in kinds(spec, constraints) for batch in batches]
    except UsageError:
        return []
