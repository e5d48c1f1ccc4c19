"""A model's tokenizer as metadata of a GGUF file. Merges, special tokens and chat template are read by gguf-py."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf

from brim.errors import UsageError
from brim.models.directory import checked_file
from brim.models.files import read_json_object

TOKENIZER = "tokenizer.json"
_PIECES = "tokenizer.model"
# What llama.cpp calls the ways of cutting a text into words, by the pattern that a tokenizer.json has for it.
_GPT2_DIGITS, _GPT2 = "smollm", "gpt-2"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS: Mapping[str, str] = {
    _WORDS + r"|\p{N}{1,3}" + _OTHERS: "llama-bpe",
    _WORDS + r"|\p{N}" + _OTHERS: "qwen2",
}


def add_vocabulary(writer: gguf.GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Write the tokenizer of this directory, if there is one.

    Raises UsageError for a tokenizer that is neither BPE of bytes nor SentencePiece: GGUF has others, for models that
    are not written here.
    """
    if (directory / TOKENIZER).exists():
        tokenizer = read_json_object(checked_file(directory, TOKENIZER))
        by_bytes = tokenizer.get("model", {}).get("type") == "BPE" and "ByteLevel" in str(tokenizer.get("decoder"))
        if by_bytes:
            _add_bytes(writer, tokenizer, vocab_size)
            _add_special(writer, directory, vocab_size, merges=True)
            return
    if (directory / _PIECES).exists():
        checked_file(directory, _PIECES)
        _add_pieces(writer, directory, vocab_size)
        _add_special(writer, directory, vocab_size, merges=False)
    elif (directory / TOKENIZER).exists():
        raise UsageError(
            f"{directory / TOKENIZER} is neither BPE of bytes nor does it come with a {_PIECES} (SentencePiece), so a "
            f"GGUF file cannot hold it; copy {_PIECES} beside it, or use --to int8 or int4"
        )


def _add_bytes(writer: gguf.GGUFWriter, tokenizer: Mapping[str, Any], vocab_size: int) -> None:
    tokens = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    _add_tokens(writer, "gpt2", tokens, kinds, vocab_size)
    if cut := cut_name(tokenizer.get("pre_tokenizer") or {}):
        writer.add_tokenizer_pre(cut)


def _add_pieces(writer: gguf.GGUFWriter, directory: Path, vocab_size: int) -> None:
    vocabulary = gguf.SentencePieceVocab(directory)
    rows = list(enumerate(vocabulary.all_tokens()))
    tokens = {number: text.decode() for number, (text, _, _) in rows}
    _add_tokens(writer, "llama", tokens, {number: kind for number, (_, _, kind) in rows}, vocab_size)
    scores = {number: score for number, (_, score, _) in rows}
    writer.add_token_scores([scores.get(number, -1000.0) for number in range(vocab_size)])
    writer.add_tokenizer_pre("default")


def _add_tokens(
    writer: gguf.GGUFWriter, model: str, tokens: Mapping[int, str], kinds: Mapping[int, int], vocab_size: int
) -> None:
    """Exactly as many as the embedding has rows; those that no text becomes get a name of their own."""
    if tokens and max(tokens) >= vocab_size:
        raise UsageError(
            f"the tokenizer has a token {max(tokens)}, and the model's embedding has {vocab_size} rows; "
            "give the model the tokenizer that it was made with"
        )
    numbers = range(vocab_size)
    writer.add_tokenizer_model(model)
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in numbers])
    writer.add_token_types([kinds.get(number, gguf.TokenType.UNUSED) for number in numbers])


def _add_special(writer: gguf.GGUFWriter, directory: Path, vocab_size: int, *, merges: bool) -> None:
    with _quiet():
        gguf.SpecialVocab(directory, load_merges=merges, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def cut_name(cutting: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json cuts text into words; None where it is none of those known here."""
    steps = cutting.get("pretokenizers") or [cutting]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return _GPT2
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return _GPT2_DIGITS
    if kinds == ["Split", "ByteLevel"] and isinstance(pattern := steps[0].get("pattern"), dict):
        return _CUTS.get(str(pattern.get("Regex")))
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """gguf-py warns of tokens that a model does not have; the user asked for none."""
    logger = logging.getLogger("gguf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
