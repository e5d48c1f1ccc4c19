"""Files that belong to a model beside its weights and config: tokenizer, generation settings, licence."""

import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from brim.models.directory import checked_file

# Named ones only: a directory may also hold other weights, logs, or what nobody meant to hand on.
_PATTERNS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_TERMS = ("licen[cs]e*", "notice*", "copying*", "use_policy*")


def companions(directory: Path, *, all_in_one: bool = False) -> tuple[Path, ...]:
    """The files to copy; beside weights that have config and tokenizer with them, terms alone.

    Raises ModelFileError for a link that leads out of the directory.
    """
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    patterns = _TERMS if all_in_one else _PATTERNS + _TERMS
    wanted = (name for name in names if any(fnmatch(name.lower(), pattern) for pattern in patterns))
    return tuple(checked_file(directory, name) for name in wanted)


def copy_companions(files: Sequence[Path], directory: Path) -> None:
    """Copy contents, not links: those of the Hub cache lead nowhere from elsewhere."""
    for path in files:
        shutil.copyfile(path, directory / path.name)
