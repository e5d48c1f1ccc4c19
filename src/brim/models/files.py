"""Reading untrusted files: what a refusal says, JSON within bounds."""

import json
from pathlib import Path
from typing import Any

from brim.errors import ModelFileError

MAX_JSON_BYTES = 32 * 2**20
"""Far above any real config or shard index (the largest known index is a few MiB)."""


MAX_JSON_VALUES = 2**21
"""Likewise (the index of a model of 92,000 tensors has as many): each takes some hundred bytes when it is read."""


def refusal(where: object, offset: int, rule: str) -> ModelFileError:
    """The error for a file that breaks a rule of its format: file, offset in bytes, rule."""
    return ModelFileError(f"{where}: at byte {offset}: {rule}; the file is damaged or not what its name says")


def file_size(path: Path) -> int:
    """Size in bytes. Raises ModelFileError where it is not a readable file."""
    try:
        if not path.is_file():
            raise ModelFileError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
        return path.stat().st_size
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError | ValueError) -> ModelFileError:
    """The error for a file that the system does not give out."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return ModelFileError(f"{path} cannot be read: {reason}")


def read_json_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in this file. Raises ModelFileError."""
    if (size := file_size(path)) > max_bytes:
        raise refusal(path, max_bytes, f"{size:,} bytes is more than the {max_bytes:,} that such a file may have")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    return parse_json_object(text, where=path, start=0)


def parse_json_object(text: bytes, *, where: object, start: int) -> dict[str, Any]:
    """The JSON object in these bytes, which begin at byte `start` of `where`. Raises ModelFileError."""
    # Every value but the first of its list or object has a comma before it.
    if (values := sum(text.count(sign) for sign in (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise refusal(where, start, f"it holds {values:,} values, more than the {MAX_JSON_VALUES:,} that are read")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise refusal(where, start + error.start, "the text is not UTF-8") from None
    except _DuplicateKeyError as error:
        raise refusal(where, start, f"the key {error.args[0]!r} occurs twice in one object") from None
    except json.JSONDecodeError as error:
        raise refusal(where, start + error.pos, f"the text is not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise refusal(where, start, f"the text is not usable JSON ({error})") from None
    if not isinstance(value, dict):
        raise refusal(where, start, "the JSON is not an object")
    return value


class _DuplicateKeyError(ValueError):
    """Parsers disagree on which of two equal keys counts, so a file with both says different things to each."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _DuplicateKeyError(key)
        values[key] = value
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
