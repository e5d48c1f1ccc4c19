"""A frozen base whose files hold its weights packed: they are taken as they are, never unpacked and packed anew."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from brim.errors import RecipeError
from brim.inference.packed import StoredWeights, stored_packings
from brim.layers.packed_linear import PackedLinear
from brim.layers.packing import Int4, Int8, Int8Absmax, Int8Shifted, Int8Words, Nf4, Packing
from brim.models import ModelSpec
from brim.models.skeleton import DTYPES
from brim.recipe import Precision, Recipe

_IN_FILES = (Int8Words, Int8Absmax, Int8Shifted)
"""INT8 in forms of files; training holds it in its own."""


class StoredBase(StoredWeights):
    """What the file holds packed, packed; what it holds plain, plain."""

    def finish(self, model: PreTrainedModel) -> None:
        """INT8 in one form. INT4 keeps the order of its file: backward unpacks it."""
        for module in model.modules():
            if isinstance(module, PackedLinear) and isinstance(module.packing, _IN_FILES):
                module.settle()


def stored_base(recipe: Recipe, spec: ModelSpec, *, rehearsed: bool) -> StoredBase | None:
    """Of a model whose files are packed; None where they are not. `rehearsed`: in the forms that are held in the end.

    Raises RecipeError where the files hold another format than the recipe says, or one that is not trained beside.
    """
    packings = stored_packings(spec)
    if packings is None:
        if spec.config.get("quantization_config"):
            raise RecipeError(
                f"{spec.name} is quantized in a form that is not taken as it is; name the model it was made from"
            )
        return None
    _check(recipe.precision, spec.name, packings)
    settled = {name: _settled(packing) for name, packing in packings.items()}
    return StoredBase(settled if rehearsed else packings, DTYPES[recipe.precision.compute], tied=spec.tied_head)


def _check(precision: Precision, name: str, packings: Mapping[str, Packing]) -> None:
    held = sorted({_said(packing) for packing in packings.values()})
    wanted = _wanted(precision)
    if held != [wanted]:
        raise RecipeError(
            f"the recipe says {wanted}, and the files of {name} hold {' beside '.join(held)}: what is packed is not "
            "packed anew; nearest: what they hold, if it is one, or the model it was made from"
        )


def _wanted(precision: Precision) -> str:
    match precision.weights:
        case "nf4":
            return f'precision.weights = "nf4", double_quant = {str(precision.double_quant).lower()}'
        case "int4":
            return f'precision.weights = "int4", group_size = {precision.group_size}'
        case _:
            return f'precision.weights = "{precision.weights}"'


def _said(packing: Packing) -> str:
    """The recipe's words for it."""
    match packing:
        case Nf4():
            return f'precision.weights = "nf4", double_quant = {str(packing.nested).lower()}'
        case Int4():
            return f'precision.weights = "int4", group_size = {packing.group_size}'
        case Int8() | Int8Words() | Int8Absmax() | Int8Shifted():
            return 'precision.weights = "int8"'
        case _:
            return "fp8, which no recipe packs"


def _settled(packing: Packing) -> Packing:
    match packing:
        case Int8Absmax():
            return Int8()
        case Int8Words() | Int8Shifted():
            return Int8(group_size=packing.group_size)
        case _:
            return packing
