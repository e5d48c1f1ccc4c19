"""A conversation as the model reads it, by the tokenizer's chat template, and where in that text the answers are.

A template that marks its answers ({% generation %}) says it itself. Of any other the answer is what changes with it:
the conversation is written once more with another answer in that turn's place; what differs, and the end of turn that
follows, is the answer. (Writing only the turns up to the answer, as others do, finds another text where a template
treats the last turn in its own way, as Qwen3's does.)
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from brim.errors import DataError
from brim.training.layouts import Message, Row

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For tokenizers without a template of their own; taken only when it is asked for."""
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER = "\ue000another answer\ue000"
"""An answer that no conversation has: a character for private use."""

Span = tuple[int, int]
"""Characters from the first to before the second."""


def conversation(row: Row, tokenizer: Any) -> tuple[str, list[Span]]:
    """(the text that the template makes of the row's turns, where the assistant's are, each with its end of turn).

    Raises DataError naming the row where the tokenizer has no template, or the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.where} is a conversation, and the tokenizer has no chat template to write it with; take an instruct "
            'model\'s, or training.chat_template = "chatml"'
        )
    template = tokenizer.get_chat_template()
    if _MARKED.search(template):
        text, spans = _render(row, row.messages, tokenizer, template)
        return text, [(start, end) for start, end in spans if end > start]
    text, _ = _render(row, row.messages, tokenizer, template)
    answers = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
    return text, [_span(row, index, text, tokenizer, template) for index in answers]


def _span(row: Row, index: int, text: str, tokenizer: Any, template: str) -> Span:
    """Where in `text` the answer of turn `index` is."""
    turns = [*row.messages[:index], replace(row.messages[index], content=_OTHER), *row.messages[index + 1 :]]
    before, found, after = _render(row, turns, tokenizer, template)[0].partition(_OTHER)
    start = shared(text, before)
    end = len(text) - shared(text[start:][::-1], after[::-1])
    if not found or end <= start:
        raise DataError(
            f"{row.where}: the chat template does not write turn {index} of the assistant: nothing of it could be "
            'learned; leave that turn out, or take training.learn = "all"'
        )
    # What ends an answer: the same whether it is the last turn or another follows.
    ending = _render(row, turns[: index + 1], tokenizer, template)[0].partition(_OTHER)[2]
    return start, end + shared(text[end:], ending)


def shared(one: Sequence[object], other: Sequence[object]) -> int:
    """How much they have in common from their beginning on."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (ours, theirs) in pairs if ours != theirs), min(len(one), len(other)))


def _render(row: Row, turns: Sequence[Message], tokenizer: Any, template: str) -> tuple[str, list[Span]]:
    try:
        (text,), spans = render_jinja_template(
            [[{"role": turn.role, "content": turn.content} for turn in turns]],
            chat_template=template,
            return_assistant_tokens_mask=_MARKED.search(template) is not None,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise DataError(f"{row.where}: the chat template refuses this conversation: {error}") from None
    return text, list(spans[0]) if spans else []
