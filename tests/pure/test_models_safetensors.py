"""The safetensors header reader: every rule refused by name, the library as oracle, fuzz."""

import json
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save

from brim.errors import ModelFileError
from brim.models.safetensors_header import DTYPES, MAX_HEADER_BYTES, parse_header, read_header

WEIGHT = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def packed(header: dict[str, Any] | bytes, data: bytes = bytes(24)) -> bytes:
    """A safetensors file around this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def refusal_of(content: bytes, directory: Path) -> str:
    path = directory / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read_header(path)
    assert caught.value.exit_code == 4
    return str(caught.value)


HOSTILE = {
    "too few for the header's length": b"\x01\x02",
    "over the format's limit": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
    "past the end of the file": (1000).to_bytes(8, "little") + b"{}",
    "does not begin with '{'": packed(b" {}", b""),
    "not UTF-8": packed(b'{"\xff": 1}', b""),
    "not JSON": packed(b'{"a": }', b""),
    "occurs twice": packed(b'{"a": ' + json.dumps(WEIGHT).encode() + b', "a": ' + json.dumps(WEIGHT).encode() + b"}"),
    "NaN is not a JSON number": packed(b'{"a": NaN}', b""),
    "recursion": packed(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "not a map from text to text": packed({"__metadata__": {"format": 1}}, b""),
    "not valid Unicode": packed(b'{"\\ud800": ' + json.dumps(WEIGHT).encode() + b"}"),
    "does not have dtype, shape and data_offsets": packed({"a": {"dtype": "F32"}}),
    "unknown dtype 'F31'": packed({"a": WEIGHT | {"dtype": "F31"}}),
    "not a list of sizes": packed({"a": WEIGHT | {"shape": [2, -3]}}),
    "not two offsets": packed({"a": WEIGHT | {"data_offsets": [0, 12, 24]}}),
    "before it begins": packed({"a": WEIGHT | {"data_offsets": [24, 0]}}),
    "overflows": packed({"a": WEIGHT | {"shape": [2**40, 2**40]}}),
    "whole byte": packed({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, bytes(2)),
    "its offsets give it 20": packed({"a": WEIGHT | {"data_offsets": [0, 20]}}, bytes(20)),
    "overlaps": packed({"a": WEIGHT, "b": WEIGHT | {"data_offsets": [12, 36]}}, bytes(36)),
    "leaves a hole": packed({"a": WEIGHT, "b": WEIGHT | {"data_offsets": [28, 52]}}, bytes(52)),
    "cut short": packed({"a": WEIGHT}, bytes(23)),
    "follow the last tensor": packed({"a": WEIGHT}, bytes(25)),
}


@pytest.mark.parametrize("rule", HOSTILE)
def test_each_rule_has_its_refusal(rule: str, tmp_path: Path) -> None:
    """A file that breaks one rule is refused with the file's name, an offset and that rule."""
    message = refusal_of(HOSTILE[rule], tmp_path)
    assert rule in message
    assert "model.safetensors: at byte " in message


def test_true_is_not_a_size(tmp_path: Path) -> None:
    """JSON's true is no number, though Python counts it as 1."""
    header = {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}
    assert "not a list of sizes" in refusal_of(packed(header, bytes(4)), tmp_path)


def test_missing_file_and_directory_are_told_apart(tmp_path: Path) -> None:
    """What is no file is said so, each in its own words."""
    with pytest.raises(ModelFileError, match="does not exist"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(ModelFileError, match="is not a file"):
        read_header(tmp_path)


NUMPY_NAMES = {"F32": "float32", "F16": "float16", "I8": "int8", "U8": "uint8", "I64": "int64", "BOOL": "bool"}
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable() and name != "__metadata__"),
    st.tuples(st.sampled_from(list(NUMPY_NAMES)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)


def written_by_the_library(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    arrays = {name: np.zeros(shape, NUMPY_NAMES[code]) for name, (code, shape) in tensors.items()}
    return save(arrays, {"format": "np"})


@given(TENSORS)
def test_reads_what_the_library_writes(tensors: dict[str, tuple[str, list[int]]]) -> None:
    """Names, shapes, dtypes and places are those that the library wrote, and the places cover the file."""
    content = written_by_the_library(tensors)
    length = int.from_bytes(content[:8], "little")
    header = parse_header(content[8 : 8 + length], total_bytes=len(content), where="file")
    found = {t.spec.name: (t.spec.dtype, list(t.spec.shape)) for t in header.tensors}
    assert found == {name: (DTYPES[code][0], shape) for name, (code, shape) in tensors.items()}
    assert header.data_start + sum(t.spec.nbytes for t in header.tensors) == len(content)
    assert header.metadata == {"format": "np"}


MUTATIONS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4)


@given(TENSORS, MUTATIONS, st.integers(0, 30))
@example({"a": ("F32", [2])}, [], 1)
def test_accepts_nothing_that_the_library_refuses(
    tensors: dict[str, tuple[str, list[int]]], mutations: list[tuple[int, int]], cut: int
) -> None:
    """A mutated file is read or refused with ModelFileError; read only if the library's own parser reads it too."""
    content = bytearray(written_by_the_library(tensors))
    for place, value in mutations:
        if place < len(content):
            content[place] = value
    mutated = bytes(content[: len(content) - cut])
    length = int.from_bytes(mutated[:8], "little")
    if length + 8 > len(mutated):
        return
    try:
        parse_header(mutated[8 : 8 + length], total_bytes=len(mutated), where="file")
    except ModelFileError:
        return
    safetensors.deserialize(mutated)  # type: ignore[no-untyped-call]


@given(st.binary(max_size=300))
def test_random_bytes_never_crash(text: bytes) -> None:
    """Any bytes as a header are read or refused with ModelFileError, nothing else."""
    with suppress(ModelFileError):
        parse_header(b"{" + text, total_bytes=9 + len(text), where="file")


def test_a_huge_length_allocates_nothing(tmp_path: Path) -> None:
    """The declared length is checked against the file before a byte is read for it."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((99_999_999).to_bytes(8, "little") + bytes(100))
    tracemalloc.start()
    with pytest.raises(ModelFileError, match="past the end"):
        read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
