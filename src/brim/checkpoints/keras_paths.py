"""Paths of Keras's newer files (`.weights.h5`, `.keras`) -> names of variables, as `keras_names` takes them.

Such a file names each layer by the attribute that holds it (of a list: by class and number), and its variables by
number alone, in the order in which they were made. transformers' own attributes and layers differ in places, family by
family; the rows are of its modeling_tf_*.py in version 4.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from brim.errors import ModelFileError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family's paths differ from its names."""

    renamed: tuple[tuple[str, str], ...] = ()
    """Beginnings or levels of a path (with the slashes around them) -> those of the name."""
    tables: Mapping[str, tuple[str, ...]]
    """Last level -> its variables that are no dense layer's or norm's."""
    matrices: str = "kernel"
    """What a dense layer's matrix is: `weight` where it lies as in PyTorch."""


_SHARED = ("weight",)
FAMILIES: Mapping[str, Family] = {
    "bert": Family(
        renamed=(
            ("/mlm/predictions/input_embeddings/", "/bert/embeddings/"), ("/layers/tf_bert_main_layer/", "/bert/"),
            ("/mlm/", "/cls/"), ("/nsp/", "/cls/"), ("/dense_output/", "/output/"), ("/bert_output/", "/output/"),
            ("/self_attention/", "/self/"),
        ),
        tables={
            "embeddings": ("word_embeddings/weight", "token_type_embeddings/weight", "position_embeddings/weight"),
            "predictions": ("bias",),
        },
    ),
    "gpt2": Family(tables={"wte": _SHARED, "wpe": _SHARED}, matrices="weight"),
    "t5": Family(
        renamed=(
            ("/layers/tft5_main_layer/", "/encoder/"), ("/layers/tft5_main_layer_1/", "/decoder/"),
            ("/tft5_layer_self_attention/", "/0/"), ("/tft5_layer_cross_attention/", "/1/"),
        ),
        tables={"shared": _SHARED, "SelfAttention": ("relative_attention_bias/weight",)},
    ),
    "bart": Family(
        renamed=(("/layers/bias_layer/", "/final_logits_bias/"),),
        tables={"shared": _SHARED, "embed_positions": _SHARED, "final_logits_bias": ("",)},
    ),
}  # fmt: skip
_LISTED = re.compile(r"tf[a-z0-9_]*?(?:_(\d+))?")
"""An element of a list, by its class: the first has no number."""


def variable_of(path: str, shape: tuple[int, ...], *, family: str, where: object) -> str:
    """The variable's name. Raises ModelFileError for a path that is not as this family's are, or another family."""
    if family not in FAMILIES:
        raise ModelFileError(
            f"{where}: the names in Keras's newer files are known for {', '.join(FAMILIES)}, and this is {family}; "
            "save the model with transformers 4 and save_pretrained(DIRECTORY, safe_serialization=False)"
        )
    row = FAMILIES[family]
    layer, _, number = path.rpartition("/vars/")
    if not number.isdecimal() or len(number) > 2:
        raise ModelFileError(f"{where}: dataset {path!r} is not named as Keras names variables; save the model anew")
    inside = f"/{layer}/"
    for found, name in row.renamed:
        inside = inside.replace(found, name)
    levels = [_level(level, inside) for level in inside.strip("/").split("/")]
    return "/".join([*levels, _last(row, levels[-1], int(number), shape, where=f"{where}: {path!r}")]).strip("/")


def _level(level: str, inside: str) -> str:
    if level == "tft5_layer_ff":  # behind the attentions: one in the encoder, two in the decoder
        return "2" if inside.startswith("/decoder/") else "1"
    listed = _LISTED.fullmatch(level)
    return listed[1] or "0" if listed else level


def _last(row: Family, layer: str, number: int, shape: tuple[int, ...], *, where: str) -> str:
    table = row.tables.get(layer)
    names = table or (("gamma", "beta") if len(shape) == 1 and number == 0 else (row.matrices, "bias"))
    if number >= len(names):
        raise ModelFileError(f"{where} is one variable more than transformers' layer has; save the model anew")
    return names[number]
