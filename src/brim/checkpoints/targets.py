"""What a conversion can be asked for: formats, and which layouts hold each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from brim.errors import UsageError

Target = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8", "fp8_e5m2", "mxfp4", "nf4", "q8_0", "q4_0"]
Family = Literal["plain", "compressed-tensors", "bitsandbytes", "torchao", "gguf"]
"""Whose layout it is; compressed-tensors has one for each format, but no word for FP8 E5M2 (8-bit floats are E4M3)."""
LAYOUTS: Mapping[Target, tuple[Family, ...]] = {
    "fp32": ("plain", "gguf"),
    "fp16": ("plain", "gguf"),
    "bf16": ("plain", "gguf"),
    "int8": ("compressed-tensors", "bitsandbytes", "torchao"),
    "int4": ("compressed-tensors",),
    "fp8": ("compressed-tensors", "torchao"),
    "fp8_e5m2": ("torchao",),
    "mxfp4": ("compressed-tensors",),
    "nf4": ("bitsandbytes",),
    "q8_0": ("gguf",),
    "q4_0": ("gguf",),
}
"""Format -> the layouts that hold it, the default first."""
ScaleChoice = Literal["absmax", "mse", "calibrated"]
"""The largest element of a block becomes the last code; or the scale with the least squared error, searched; or with
the least error of a layer's outputs on a text, and codes with error feedback (what no calibration reaches: as mse)."""
TOKENS = 16_384
"""Of a calibration text, unless another number is asked for: GPTQ's paper has 16 times as many, and gains little by
them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """What flows through the model; not the text it is judged by afterwards."""

    text: str
    max_tokens: int = TOKENS


def element_format(to: Target) -> str:
    """The row of `numerics.formats`; of the two FP8 formats, `fp8` is the one with more digits."""
    return "fp8_e4m3" if to == "fp8" else to


def checked_layout(to: Target, layout: Family | None) -> Family:
    """The layout (None: the format's default). Raises UsageError for one that does not hold the format."""
    if layout is not None and layout not in LAYOUTS[to]:
        held = [format for format, layouts in LAYOUTS.items() if layout in layouts]
        raise UsageError(
            f"layout {layout} does not hold {to}; it holds {', '.join(held)}, and {to} goes into "
            f"{' or '.join(LAYOUTS[to])}"
        )
    return layout or LAYOUTS[to][0]


class Wanted(NamedTuple):
    """One output: a format, and the layout that holds it."""

    to: Target
    layout: Family | None = None
    """None: the format's default."""

    @property
    def name(self) -> str:
        """Of its directory, where there are several."""
        return f"{self.to}-{checked_layout(*self)}"


def wanted_of(targets: Sequence[Target], layouts: Sequence[Family]) -> tuple[Wanted, ...]:
    """Each format in each of the layouts that hold it (none given: in its default).

    Raises UsageError for a format that none of the layouts holds, a layout that holds none of the formats, and what is
    named twice.
    """
    pairs = [Wanted(to, layout) for to in targets for layout in LAYOUTS[to] if layout in layouts]
    idle = [layout for layout in layouts if layout not in {layout for _, layout in pairs}]
    if not layouts:
        pairs = [Wanted(to) for to in targets]
    for to in targets:
        if to not in {target for target, _ in pairs}:
            checked_layout(to, layouts[0])
    if idle:
        checked_layout(targets[0], idle[0])
    if len(set(targets)) < len(targets) or len(set(layouts)) < len(layouts):
        raise UsageError(f"{', '.join((*targets, *layouts))} names something twice; name each format and layout once")
    return tuple(pairs)
