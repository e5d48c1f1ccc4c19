"""What is learned of a conversation: every answer with its end of turn and nothing else, by any kind of template."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from brim.errors import DataError
from brim.layers.chunked_loss import IGNORED
from brim.recipe import Recipe, Training
from brim.training.chat import CHATML
from brim.training.data import tokenize
from brim.training.examples import Example, examples_of
from brim.training.layouts import Message, Row

MARKED = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '</>' }}{% endgeneration %}{% else %}{{ m['content'] + '</>' }}{% endif %}"
    "{% endfor %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
STRIPPED = UNMARKED.replace("m['content']", "m['content'] | trim")
# As Qwen3's: the last answer has a thought before it, which the others lack.
THINKS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '<think></think>' }}{% endif %}{{ m['content'] + '</>' }}{% endfor %}"
)
# As Mistral's: the question stands in marks, the answer ends with one, and a system's words go into the first question.
WRAPPED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% elif m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% else %}{{ raise_exception('no role ' + m['role']) }}{% endif %}{% endfor %}"
)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<>/\ue000"), min_size=1, max_size=8).filter(str.strip)
TALKS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)


def written_by(tokenizer: Any, template: str) -> Any:
    """A tokenizer of its own with this template."""
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    copy.chat_template = template
    return copy


def talk(turns: Sequence[tuple[str, str]], *first: Message) -> Row:
    spoken = [Message(*said) for ask, answer in turns for said in (("user", ask), ("assistant", answer))]
    return Row("", "", messages=(*first, *spoken), where="talks.jsonl, line 7")


def causal(**training: Any) -> Recipe:
    return Recipe(model="any", seq_len=8, micro_batch_size=1, training=Training(**training))


def learned(example: Example, tokenizer: Any) -> list[str]:
    """The texts that are learned, one for each stretch of learned tokens."""
    stretches: list[list[int]] = []
    before = False
    for token, wanted in zip(example.ids, example.learned, strict=True):
        if wanted and not before:
            stretches.append([])
        if wanted:
            stretches[-1].append(token)
        before = wanted
    return [tokenizer.decode(ids) for ids in stretches]


@given(turns=TALKS)
def test_each_answer_is_learned_and_nothing_else(tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    """Of a conversation the learned tokens are the answers with their end of turn, whatever the template does else."""
    row = talk(turns)
    for template, ending, said in (
        (UNMARKED, "</>", str),
        (STRIPPED, "</>", str.strip),
        (THINKS, "</>", str),
        (WRAPPED, tokenizer.eos_token, str),
        (CHATML, "<|im_end|>\n", str),
    ):
        speaker = written_by(tokenizer, template)
        (example,) = examples_of([row], speaker, causal())
        assert learned(example, speaker) == [said(answer) + ending for _, answer in turns]
        turns_of = [{"role": message.role, "content": message.content} for message in row.messages]
        assert example.ids == speaker.apply_chat_template(turns_of)["input_ids"]


@given(turns=TALKS)
def test_marks_in_a_template_are_obeyed(tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    """Where a template marks its answers, the learned tokens are those that transformers' own mask has; without the
    marks they are the same."""
    row = talk(turns, Message("system", "Be brief."))
    marked, unmarked = written_by(tokenizer, MARKED), written_by(tokenizer, UNMARKED)
    (example,) = examples_of([row], marked, causal())
    turns_of = [{"role": message.role, "content": message.content} for message in row.messages]
    theirs = marked.apply_chat_template(turns_of, return_assistant_tokens_mask=True)
    assert (example.ids, example.learned) == (theirs["input_ids"], [bool(one) for one in theirs["assistant_masks"]])
    assert examples_of([row], unmarked, causal()) == [example]


@given(source=WORDS, target=WORDS)
def test_of_a_pair_the_answer_is_learned(tokenizer: Any, source: str, target: str) -> None:
    """Of prompt and completion the completion and the end token are learned; `learn = "all"` learns both, and
    `pairs_as_chat` writes them as a conversation."""
    (example,) = examples_of([Row(source, target)], tokenizer, causal())
    assert tokenizer.decode(example.ids) == f"{source}\n{target}{tokenizer.eos_token}"
    assert learned(example, tokenizer) == [target + tokenizer.eos_token]
    (whole,) = examples_of([Row(source, target)], tokenizer, causal(learn="all"))
    assert whole == Example(example.ids, [True] * len(example.ids))
    speaker = written_by(tokenizer, UNMARKED)
    assert examples_of([Row(source, target)], speaker, causal(pairs_as_chat=True)) == examples_of(
        [talk([(source, target)])], speaker, causal()
    )


@given(turns=TALKS)
def test_a_tokenizer_without_places(tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    """A tokenizer that does not say where its tokens are gives the same answer by its prefixes."""

    class Slow:
        """Everything of the fast one but the places."""

        is_fast, eos_token_id = False, tokenizer.eos_token_id
        chat_template, special_tokens_map = UNMARKED, tokenizer.special_tokens_map

        def get_chat_template(self) -> str:
            return UNMARKED

        def __call__(self, *texts: Any, return_offsets_mapping: bool = False, **named: Any) -> Any:
            assert not return_offsets_mapping
            return tokenizer(*texts, **named)

    rows = [talk(turns), Row(*turns[0])]
    assert examples_of(rows, Slow(), causal()) == examples_of(rows, written_by(tokenizer, UNMARKED), causal())


def test_blanks_and_long_letters_are_learned_too() -> None:
    """Tokens of blanks, and all bytes of a letter, are learned where a tokenizer (GPT-2's) gives them no length; a
    token that begins before the answer and reaches into it is learned whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "Ġ"), ("Ċ", "Ċ")]
    letters = [*alphabet, "ĠĠ", "ĊĊ"]
    inner = Tokenizer(models.BPE(vocab={"<end>": 0, **{a: i + 1 for i, a in enumerate(letters)}}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    inner.decoder = decoders.ByteLevel()
    trimming = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    for target in ("  x\n\n  y  ", "x\n\n", "\U0001f30a", "  \u00e9"):
        (example,) = examples_of([Row("ask  ", target)], trimming, causal())
        (found,) = learned(example, trimming)
        # A token that reaches over the line end before the answer is learned whole.
        assert found in (f"{target}<end>", f"\n{target}<end>")
    (example,) = examples_of([Row("ask  ", "\n")], trimming, causal())
    assert learned(example, trimming) == ["\n\n<end>"]


def test_refusals(tokenizer: Any) -> None:
    """A conversation without a template, one that the template refuses, and an answer that it leaves out are errors
    with the row's place; so is a conversation for a task that reads none."""
    row = talk([("a", "b")])
    for template, said in (
        (None, "no chat template.*chatml"),
        (WRAPPED, "refuses this conversation: no role system"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not write turn 2"),
        ("{{ messages[0].nothing.there }}", "refuses this conversation"),
    ):
        speaker = written_by(tokenizer, template) if template else tokenizer
        with pytest.raises(DataError, match=rf"^talks\.jsonl, line 7.*{said}"):
            examples_of([replace(row, messages=(Message("system", "c"), *row.messages))], speaker, causal())
    with pytest.raises(DataError, match="line 7 is a conversation, and task"):
        tokenize([row], tokenizer, replace(causal(), task="masked-lm"))


@pytest.mark.parametrize("packing", [False, True])
def test_rows_teach_the_answers(tokenizer: Any, packing: bool) -> None:
    """Blocks and packed rows have labels for exactly the answers; rows in which none is are left out, and each row
    knows which examples it is from."""
    answers = ["first", "second answer"]
    data = tokenize(
        [Row("question " * 9, answer, where=f"line {number}") for number, answer in enumerate(answers)],
        tokenizer, causal(packing=packing),
    )  # fmt: skip
    kept = data.labels[data.labels != IGNORED].tolist()
    # In any order: packing puts a piece where it leaves the least room.
    assert sorted(kept) == sorted(tokenizer("".join(answers))["input_ids"] + [tokenizer.eos_token_id] * 2)
    assert ((data.labels != IGNORED).any(dim=1)).all()
    assert data.origins is not None and data.counts is not None
    for labels, examples in zip(data.labels, data.origins.examples, strict=True):
        learns = tokenizer.decode(labels[labels != IGNORED]).replace(tokenizer.eos_token, "")
        assert set(learns) <= set("".join(answers[example] for example in examples))
    assert data.places_of(range(len(data))) == ["line 0", "line 1"]
    assert data.counts.examples == data.counts.cut == 2
    assert data.counts.learned == len(kept) == len("".join(answers)) + 2
    assert data.counts.tokens == sum(len(f"{'question ' * 9}\n{answer}") + 1 for answer in answers)


def test_chatml_is_what_its_makers_write(tokenizer: Any) -> None:
    """ChatML as OpenAI described it: each turn between its start and end marks."""
    speaker = written_by(tokenizer, CHATML)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert speaker.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == expected
    assert speaker.apply_chat_template(turns, tokenize=False) == f"{expected}Ho<|im_end|>\n"
    assert json.loads(json.dumps(CHATML)) == CHATML
