"""Files made to take memory: each is refused, and what is held meanwhile stays under a bound."""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.errors import BrimError, ModelFileError
from brim.models import describe
from brim.models.directory import stored_tensors
from brim.models.gguf_header import read_gguf_header
from brim.models.safetensors_header import read_header
from brim.units import MIB, parse_bytes, parse_count

BOUND_BYTES = 512 * MIB
"""As `brim quantize` has it, too."""
MIB_32 = 2**25


def safetensors(path: Path, text: bytes, *, length: int | None = None, total: int = 0) -> None:
    """A file with this header; `length` may lie, and the file may go on in zeros that take no disk."""
    declared = len(text) if length is None else length
    path.write_bytes(declared.to_bytes(8, "little") + text)
    os.truncate(path, max(8 + len(text), total))


def many(value: str, nbytes: int) -> bytes:
    """`{"a": [value, value, ...]}` of about this length."""
    return b'{"a":[' + b",".join([value.encode()] * (nbytes // (len(value) + 1))) + b"]}"


HEADERS: dict[str, Callable[[Path], None]] = {
    "a header of 100 MB": lambda path: safetensors(path, b"{", length=100_000_000, total=200_000_000),
    "a header longer than the file": lambda path: safetensors(path, b"{}", length=MIB_32),
    "a header of 2^64 bytes": lambda path: safetensors(path, b"{}", length=2**64 - 1, total=2**40),
    "32 MiB of small texts": lambda path: safetensors(path, many('""', MIB_32 - 99)),
    "32 MiB of small numbers": lambda path: safetensors(path, many("1", MIB_32 - 99)),
    "32 MiB of empty lists": lambda path: safetensors(path, many("[]", MIB_32 - 99)),
    "32 MiB of open brackets": lambda path: safetensors(path, b'{"a":' + b"[" * (MIB_32 - 99)),
    "lists in lists": lambda path: safetensors(path, b'{"a":' + b"[" * 99_999 + b"]" * 99_999 + b"}"),
    "objects in objects": lambda path: safetensors(path, b'{"a":' * 99_999 + b"1" + b"}" * 99_999),
    "wide characters": lambda path: safetensors(path, b'{"a":"' + b"x" * (MIB_32 - 99) + "\U0001f600".encode() + b'"}'),
    "a number of a million digits": lambda path: safetensors(path, b'{"a":' + b"9" * 10**6 + b"}"),
    "a shape of a million sizes": lambda path: safetensors(
        path,
        b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[' + b"1," * 10**6 + b"1]},"
        b'"b":{"dtype":"F32","data_offsets":[0,4],"shape":[1]}}',
        total=2**30,
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_takes_no_more_than_the_bound(name: str, tmp_path: Path) -> None:
    """Whatever a header holds or promises, it is refused and reading it takes less than the bound."""
    path = tmp_path / "model.safetensors"
    HEADERS[name](path)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match=r"model\.safetensors: at byte \d+: "):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < BOUND_BYTES
    finally:
        tracemalloc.stop()


def gguf(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


GGUF_LIES = {
    "tensors without end": gguf(2**63, 0),
    "keys without end": gguf(0, 2**63),
    "a text of 2^60 bytes": gguf(0, 1, text(b"k") + struct.pack("<IQ", 8, 2**60)),
    "a key of 2^60 bytes": gguf(0, 1, struct.pack("<Q", 2**60)),
    "an array of 2^60 numbers": gguf(0, 1, text(b"k") + struct.pack("<IIQ", 9, 10, 2**60)),
    "an array of 2^60 texts": gguf(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 2**60)),
    "an array of arrays": gguf(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 2)),
    "a tensor of 2^32 dimensions": gguf(1, 0, text(b"t") + struct.pack("<I", 2**32 - 1)),
    "sizes that wrap": gguf(1, 0, text(b"t") + struct.pack("<IQQIQ", 2, 2**33, 2**33, 0, 0)),
    "an offset past the end": gguf(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 2**62)),
}


@pytest.mark.parametrize("name", GGUF_LIES)
def test_a_gguf_that_lies_takes_next_to_nothing(name: str, tmp_path: Path) -> None:
    """Counts and lengths are held against the file before they are believed, also in a file of a terabyte of holes."""
    path = tmp_path / "m.gguf"
    for total in (0, 2**40):
        path.write_bytes(GGUF_LIES[name])
        os.truncate(path, max(len(GGUF_LIES[name]), total))
        tracemalloc.start()
        try:
            with pytest.raises(ModelFileError, match=r"m\.gguf: at byte \d+: "):
                read_gguf_header(path)
            assert tracemalloc.get_traced_memory()[1] < 8 * MIB
        finally:
            tracemalloc.stop()


def test_an_index_takes_no_more_than_the_bound(tmp_path: Path) -> None:
    """An index of more entries than any model has is refused before it is read into memory."""
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(b'{"weight_map":{' + b",".join(b'"%d":""' % number for number in range(2_200_000)) + b"}}")
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match="values, more than"):
            stored_tensors(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < BOUND_BYTES
    finally:
        tracemalloc.stop()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "text_config",
     "intermediate_size", "quantization_config", "tie_word_embeddings", "torch_dtype", "dtype", "auto_map"]
)  # fmt: skip
SOME: st.SearchStrategy[object] = st.sampled_from(
    ["llama", "gpt2", "t5", "", -1, 0, 1, 8, 2**70, True, None, [], {}, 1.5, "float32"]
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(KEYS, SOME | JSON, max_size=8) | JSON, st.dictionaries(st.text(max_size=9), JSON, max_size=3))
def test_any_config_and_index_is_read_or_refused(config: object, index: object) -> None:
    """A directory with any JSON as config and as index is described, or refused in our words."""
    tmp = _place()
    (tmp / "config.json").write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
    for weight_map in (index, {"weight_map": index}):
        (tmp / "model.safetensors.index.json").write_text(json.dumps(weight_map))
        try:
            describe(str(tmp))
        except BrimError:
            continue


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4))
def test_damaged_safetensors_are_read_or_refused(tail: bytes, mutations: list[tuple[int, int]]) -> None:
    """A sound file with some bytes changed and others after it is read, or refused in our words."""
    fields = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    header = json.dumps(fields).encode()
    sound = bytearray(len(header).to_bytes(8, "little") + header + bytes(32) + tail)
    for place, value in mutations:
        sound[place % len(sound)] = value
    path = _place() / "model.safetensors"
    path.write_bytes(sound)
    try:
        found = read_header(path)
    except ModelFileError:
        return
    assert found.data_start + sum(entry.spec.nbytes for entry in found.tensors) == len(sound)


@pytest.mark.parametrize("text", ["1" * 50_000 + "x", " " * 50_000 + "x", "1" + "_," * 50_000 + "!", "1." * 50_000])
def test_patterns_do_not_explode(text: str) -> None:
    """What a user types for a size or a count is matched in time that grows with its length, not faster."""
    for parse in (parse_bytes, partial(parse_count, what="parameters")):
        with pytest.raises(BrimError):
            parse(text)


def _place() -> Path:
    return _PLACES[0]


_PLACES: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One directory for all examples of the module's hypotheses."""
    _PLACES[:] = [tmp_path_factory.mktemp("fuzz")]
