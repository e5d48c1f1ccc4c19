"""Words for failure: every error a user can cause, with the exit code it ends the command with.

A message says subject, value, rule and next step. Our own broken invariants are `assert`s, not these.
"""

import difflib
from collections.abc import Iterable


class BrimError(Exception):
    """An error the user can mend; `exit_code` is what the command line returns."""

    exit_code = 2


class UsageError(BrimError, ValueError):
    """The question itself is wrong: an option, a value, a combination."""


class RecipeError(UsageError):
    """A recipe names a setting that does not exist, or a combination that cannot run."""


class UnknownNameError(BrimError, LookupError):
    """A model, device or format that nobody here knows."""


class MissingPartError(BrimError, ImportError):
    """An optional package is needed; the message holds the command that installs it."""


class DoesNotFitError(BrimError, MemoryError):
    """Nothing fits the memory (or the output does not fit the disk)."""

    exit_code = 3


class ModelFileError(BrimError, ValueError):
    """A model file is damaged or hostile: file, offset, rule."""

    exit_code = 4


class DataError(BrimError, ValueError):
    """Training or evaluation data cannot be used: file, line, rule."""

    exit_code = 4


class RanOutOfMemoryError(BrimError, MemoryError):
    """A run met the end of its memory in spite of the prediction."""

    exit_code = 5


class Stopped(BrimError):
    """A signal ended the run after it saved; the same command with `--resume` goes on."""

    exit_code = 75


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Up to `count` known names that look most like `name`, best first."""
    by_folded = {candidate.casefold(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.casefold(), by_folded, n=count, cutoff=0.45)
    return [by_folded[match] for match in matches]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean a, b?` for the end of a message, or an empty string when nothing is near."""
    names = nearest(name, known)
    return f"; did you mean {', '.join(names)}?" if names else ""
