"""Which tensors a pattern names: a glob, or after `re:` a regular expression that ends in bounded time.

Python's expressions may take time exponential in the text's length. Here repeated groups, back references and
look-arounds are refused and at most three parts may repeat without bound, so that a name of L characters is matched in
the order of L^3 steps; names longer than that is quick for match nothing. Globs take no more (fnmatch's are atomic).
"""

import re
import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from brim.errors import UsageError

_MOST_REPEATS = 3
_LONGEST_PATTERN, _LONGEST_NAME = 200, 256
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\(\?|[()*+?{}]|.", re.DOTALL)


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a whole name is what the pattern says. Raises UsageError for one that may take too long, or is none."""
    if not pattern or len(pattern) > _LONGEST_PATTERN:
        raise UsageError(f"pattern {pattern[:40]!r} has {len(pattern)} characters; use 1 to {_LONGEST_PATTERN}")
    if not pattern.startswith("re:"):
        return lambda name: len(name) <= _LONGEST_NAME and fnmatchcase(name, pattern)
    expression = pattern.removeprefix("re:")
    _check_bounded(expression, pattern)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of what later versions of Python will read otherwise
            compiled = re.compile(expression, re.ASCII)
    except (re.error, FutureWarning, RecursionError, OverflowError) as error:
        raise UsageError(f"pattern {pattern!r} is no regular expression: {error}; or write a glob: *.mlp.*") from None
    return lambda name: len(name) <= _LONGEST_NAME and compiled.fullmatch(name) is not None


def named(pattern: str, names: Iterable[str]) -> frozenset[str]:
    """The names that the pattern matches. Raises UsageError where there are none: most often a slip of the pen."""
    matches, known = matcher(pattern), sorted(names)
    if found := frozenset(name for name in known if matches(name)):
        return found
    example = f"; one is {known[0]!r}" if known else ""
    raise UsageError(f"pattern {pattern!r} matches none of the {len(known)} weights that can be quantized{example}")


def _check_bounded(expression: str, pattern: str) -> None:
    tokens = _TOKEN.findall(expression)
    repeats = 0
    for before, token in zip(["", *tokens], tokens, strict=False):
        if token in ("{", "}", "(?") or (token[0] == "\\" and token[1:2].isdigit()):
            raise UsageError(
                f"pattern {pattern!r}: {token} is not taken here, since it may take unbounded time; write it out"
            )
        if token in ("*", "+", "?"):
            if before == ")":
                raise UsageError(
                    f"pattern {pattern!r}: a repeated group may take unbounded time; repeat single characters"
                )
            # After another of these it only says how that one repeats.
            repeats += token != "?" and before not in ("*", "+", "?")
    if repeats > _MOST_REPEATS:
        raise UsageError(
            f"pattern {pattern!r} repeats {repeats} parts without bound; use at most {_MOST_REPEATS}, or more patterns"
        )
