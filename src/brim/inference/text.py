"""Texts to measure a model on: a user's file, or the excerpt that ships with the package."""

from importlib import resources
from pathlib import Path

from brim.errors import DataError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises DataError with file and line."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line}: byte {raw[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from None
    if not text.strip():
        raise DataError(f"{path}: line 1: the file holds no text; perplexity needs at least two tokens")
    return text


def held_text() -> str:
    """Some 70 KB of WikiText-2's validation articles (`data/SOURCE.md`), for a comparison without a file at hand."""
    return resources.files("brim.inference").joinpath("data/wikitext2_excerpt.txt").read_text(encoding="utf-8")
