"""Several formats in one model: which linear weight gets which."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from brim.checkpoints.patterns import matcher, named
from brim.errors import UsageError

KEPT = "kept"
"""In place of a format: as it is in the source."""
MIXED = ("int8", "int4")
"""Formats that one layout's readers load side by side: compressed-tensors' pack-quantized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What departs from the format that was asked for."""

    keep: tuple[str, ...] = ()
    """Patterns of weights that are left as they are; they win over all else."""
    formats: tuple[tuple[str, str], ...] = ()
    """Pattern and format; of several that match a weight the last counts."""
    chosen: Mapping[str, str] = field(default_factory=dict)
    """Name -> format or KEPT, decided for each weight (by a budget); patterns win over it."""

    def __bool__(self) -> bool:
        return bool(self.keep or self.formats or self.chosen)

    def assigned(self, weights: Iterable[str], *, to: str) -> Mapping[str, str]:
        """Format or KEPT of each weight. Raises UsageError for a pattern that matches none."""
        found = {name: self.chosen.get(name, to) for name in weights}
        for pattern, format in self.formats:
            found |= dict.fromkeys(named(pattern, found), format)
        for pattern in self.keep:
            found |= dict.fromkeys(named(pattern, found), KEPT)
        return found


NO_MIXTURE = Mixture()


def parse_mixture(*, keep: Iterable[str], formats: Iterable[str]) -> Mixture:
    """Of patterns, and of texts `PATTERN=FORMAT`. Raises UsageError."""
    pairs, kept = [], tuple(keep)
    for text in formats:
        pattern, equals, format = text.rpartition("=")
        if not (equals and pattern and format.lower() in MIXED):
            raise UsageError(
                f"--format {text!r} is not PATTERN=FORMAT with a format of {', '.join(MIXED)}, which readers load side "
                "by side; write for example '*.down_proj.weight=int8'"
            )
        pairs.append((pattern, format.lower()))
    for pattern in (*kept, *(pattern for pattern, _ in pairs)):
        matcher(pattern)
    return Mixture(keep=kept, formats=tuple(pairs))
