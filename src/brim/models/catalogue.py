"""Models that Brim knows without asking anybody: facts shipped with the package (data/SOURCE.md says from where)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

_SYNTHETIC = "synthetic/"


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """One model."""

    alias: str
    """What users call it: `smollm2-135m`."""
    key: str
    """Its Hub id; `synthetic/...` for a reference shape that has no weights."""
    config: Mapping[str, Any]
    num_parameters: int
    """Distinct parameters of the model built from `config`, with its head as released."""
    tied_head: bool
    """As released: FLAN-T5 and mT5 have a head of their own, whatever their config's class says."""
    published_parameters: int
    published_exact: bool
    """False where the publisher gives a rounded figure only."""
    year: int | None
    """Of release; None for a reference shape."""
    context_length: int | None
    """Tokens; None where the architecture sets no limit."""
    licence: str
    """Of the weights."""
    source: str
    """Public places where the facts were read."""

    @property
    def hub_id(self) -> str | None:
        """None for a reference shape."""
        return None if self.key.startswith(_SYNTHETIC) else self.key


@cache
def entries() -> Mapping[str, CatalogueEntry]:
    """All models by alias, in the order of the data."""
    text = resources.files("brim.models").joinpath("data", "catalogue.json").read_text(encoding="utf-8")
    return {fields["alias"]: CatalogueEntry(key=key, **fields) for key, fields in json.loads(text).items()}


def find(name: str) -> CatalogueEntry | None:
    """The entry with this alias, Hub id or last part of a Hub id, in any case; None when there is none."""
    return _by_name().get(name.casefold())


def names() -> tuple[str, ...]:
    """What a user may write: aliases, then Hub ids."""
    return (*entries(), *(entry.key for entry in entries().values()))


@cache
def _by_name() -> Mapping[str, CatalogueEntry]:
    found: dict[str, CatalogueEntry] = {}
    for spelling in (_last_part, _key, _alias):  # the later wins: an alias is never shadowed
        found.update({spelling(entry).casefold(): entry for entry in entries().values()})
    return found


def _last_part(entry: CatalogueEntry) -> str:
    return entry.key.rpartition("/")[2]


def _key(entry: CatalogueEntry) -> str:
    return entry.key


def _alias(entry: CatalogueEntry) -> str:
    return entry.alias
