"""Plain values to dataclasses and back: each field's type says what a key may hold."""

import dataclasses
import tomllib
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from brim.errors import RecipeError, did_you_mean

_Section = TypeVar("_Section")


def read(section: type[_Section], values: Mapping[str, Any], *, where: str, prefix: str = "") -> _Section:
    """A dataclass from the plain values of a TOML file. Raises RecipeError that starts with `where`."""
    hints = _hints(section)
    for key in values:
        if key not in hints:
            raise RecipeError(f"{where}: unknown key {prefix + key!r}{_key_meant(key, hints, prefix)}")
    read = {key: _read_value(hints[key], value, where=where, key=prefix + key) for key, value in values.items()}
    try:
        return section(**read)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _hints(section: Any) -> Mapping[str, Any]:
    """Field -> type. Reading them takes longer than all else, and a plan makes hundreds of recipes."""
    return _read_hints(section)


@cache
def _read_hints(section: Any) -> Mapping[str, Any]:
    return get_type_hints(section)


def _key_meant(key: str, hints: Mapping[str, Any], prefix: str) -> str:
    """The keys of this section that look like it, or the section where it really belongs."""
    if prefix == "":
        for name, section in hints.items():
            if dataclasses.is_dataclass(section) and key in _hints(section):
                return f"; it belongs in [{name}], as {name}.{key}"
    return did_you_mean(key, hints) or f"; known: {', '.join(hints)}"


def _read_value(hint: Any, value: Any, *, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where}: {key} is a section; write [{key}] with its keys below it")
        return read(cast(type[Any], hint), value, where=where, prefix=f"{key}.")
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            known = [str(choice) for choice in get_args(hint)]
            raise RecipeError(
                f"{where}: {key} = {value!r} is not one of {', '.join(known)}{did_you_mean(str(value), known)}"
            )
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise RecipeError(f'{where}: {key} = {value!r} is not a list of names; write ["q_proj", "v_proj"]')
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise RecipeError(f"{where}: {key} = {value!r} is not {_WORDS[hint]}")
    return value


_WORDS = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}


def assign(values: dict[str, Any], path: list[str], value: Any, *, sections: Collection[str], setting: str) -> None:
    """Put `value` at the dotted `path`. Raises RecipeError, naming the `--set` that asked for it."""
    *outer, key = path
    for section in outer:
        if not isinstance(values.get(section), dict):
            raise RecipeError(f"--set {setting}: unknown section {section!r}{did_you_mean(section, sections)}")
        values = values[section]
    if key in sections and not outer:
        raise RecipeError(f"--set {setting}: {key} is a section; name one of its keys, as {key}.KEY=VALUE")
    values[key] = value


def parse_value(text: str) -> Any:
    """A TOML value; a bare word is a text, so that `--set method=lora` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def plain(value: Any) -> Any:
    """Records as dictionaries and tuples as lists, at any depth: what TOML and JSON know."""
    if dataclasses.is_dataclass(value):
        return {name: plain(getattr(value, name)) for name in _hints(type(value))}
    return list(value) if isinstance(value, tuple) else value
