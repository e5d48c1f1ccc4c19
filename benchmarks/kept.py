"""Answers that a benchmark keeps line by line, so that a run which was stopped goes on."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from brim.models import ModelSpec
from brim.recipe import Recipe


class Kept:
    """Rows by key, in a file of a JSON object a line; the last of a key counts."""

    def __init__(self, file: Path, *, fresh: bool = False) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            file.unlink(missing_ok=True)
        self._file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self._rows: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._rows[key]

    def put(self, key: str, row: Mapping[str, Any]) -> None:
        self._rows[key] = {"key": key, **row}
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(self._rows[key]) + "\n")


def key_of(spec: ModelSpec, recipe: Recipe, *more: str) -> str:
    """Of the architecture and of what a recipe says beyond its defaults, so that a new key of recipes changes none."""
    usual = dict(_settings(Recipe(model=recipe.model).to_dict()))
    said = {name: value for name, value in _settings(recipe.to_dict()) if usual.get(name) != value}
    told = json.dumps([dict(spec.config), spec.num_parameters, said, *more], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _settings(values: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, prefix=f"{prefix}{name}.")
        else:
            yield prefix + name, value
