"""A row of a data file -> one example: plain text, a source and its answer, or a conversation.

Layouts are recognised by the names of a row's columns. Conversations: `messages` of role and content, or ShareGPT's
`conversations` of from and value; either key with either pair of names.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from brim.errors import DataError, did_you_mean

_LAYOUTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("prompt",), "completion"),
    (("question",), "answer"),
    (("instruction", "input"), "output"),
    (("instruction",), "output"),
    (("source",), "target"),
    ((), "text"),
)
"""Names of the columns of source and target; the first layout that a row has counts."""
_CONVERSATIONS = ("messages", "conversations")
"""Columns of turns; they count before all else, since such rows often repeat the first question beside them."""
_TURNS = (("role", "content"), ("from", "value"))
_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip
"""As rows name who speaks -> as chat templates do."""

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One example; `source` is empty for plain text, both are for a conversation."""

    source: str
    target: str
    label: str | None = None
    """The class of a text, where the row names one."""
    messages: tuple[Message, ...] = ()
    where: str = field(default="the data", compare=False)
    """File and line, for errors."""

    @property
    def text(self) -> str:
        """As a causal model reads it."""
        return f"{self.before}{self.target}"

    @property
    def before(self) -> str:
        """What stands before the answer."""
        return f"{self.source}\n" if self.source else ""


def row_of(value: Any, *, where: str) -> Row:
    """Raises DataError that begins with `where` for a value of no known layout."""
    if not isinstance(value, Mapping):
        raise DataError(f'{where}: not an object; write {{"text": "..."}}')
    for name in _CONVERSATIONS:
        if name in value:
            return Row("", "", messages=_messages(value[name], where=f"{where}: {name}"), where=where)
    for sources, target in _LAYOUTS:
        if target in value and all(name in value for name in sources):
            parts = [value[name] for name in (*sources, target)]
            if not all(isinstance(part, str) for part in parts):
                raise DataError(f"{where}: {', '.join((*sources, target))} must be texts")
            _check_characters(parts, where=where)
            if not parts[-1].strip():
                raise DataError(f"{where}: {target!r} is empty: nothing to learn")
            source = "\n".join(part for part in parts[:-1] if part)
            return Row(source, parts[-1], _label(value, where=where), where=where)
    known = sorted({*_CONVERSATIONS, *(name for sources, target in _LAYOUTS for name in (*sources, target))})
    hints = "".join(did_you_mean(name, known) for name in list(value)[:4])
    layouts = "; ".join([*_CONVERSATIONS, *("+".join((*sources, target)) for sources, target in _LAYOUTS)])
    raise DataError(f"{where}: columns {', '.join(map(str, value))} are no known layout ({layouts}){hints}")


def _messages(turns: Any, *, where: str) -> tuple[Message, ...]:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise DataError(f'{where} is not a list of turns; write [{{"role": "user", "content": "..."}}, ...]')
    messages = tuple(_message(turn, where=f"{where}[{index}]") for index, turn in enumerate(turns))
    if all(message.role != "assistant" for message in messages):
        raise DataError(f"{where} has no turn of the assistant: nothing to learn")
    return messages


def _message(turn: Any, *, where: str) -> Message:
    names = next((pair for pair in _TURNS if isinstance(turn, Mapping) and all(name in turn for name in pair)), None)
    if names is None:
        raise DataError(f'{where} is no turn; write {{"role": "user", "content": "..."}}')
    role, content = (turn[name] for name in names)
    if role not in _ROLES:
        raise DataError(
            f"{where}: {names[0]} {role!r} is not one of {', '.join(_ROLES)}{did_you_mean(str(role), _ROLES)}"
        )
    if not isinstance(content, str):
        raise DataError(f"{where}: {names[1]} must be a text")
    _check_characters([content], where=where)
    if _ROLES[role] == "assistant" and not content.strip():
        raise DataError(f"{where}: {names[1]} is empty: nothing to learn")
    return Message(_ROLES[role], content)


def _check_characters(parts: Sequence[str], *, where: str) -> None:
    if any(map(_SURROGATE.search, parts)):
        raise DataError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no character; remove it")


def _label(value: Mapping[str, Any], *, where: str) -> str | None:
    label = value.get("label")
    if label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise DataError(f"{where}: label {label!r} is neither the name of a class nor its number")
    return str(label)
