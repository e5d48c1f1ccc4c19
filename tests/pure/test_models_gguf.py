"""The GGUF header reader: every rule refused by name, the gguf package as oracle, fuzz."""

import struct
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.errors import ModelFileError, UnknownNameError
from brim.models.gguf_config import config_from_gguf
from brim.models.gguf_header import BLOCKS, MAX_KEPT_NUMBERS, read_gguf_header

U8, U32, BOOL, STRING, ARRAY = 0, 4, 7, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def made(
    keys: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A GGUF file of these parts; `counts` (tensors, keys) may lie."""
    declared = counts or (len(tensors), len(keys))
    front = b"GGUF" + struct.pack("<IQQ", version, *declared) + b"".join(keys) + b"".join(tensors)
    return front + bytes(-len(front) % 32) + data


ONE = tensor("a", [4])
HOSTILE = {
    "the magic takes 4 bytes": b"GG",
    "does not begin with 'GGUF'": b"GGML" + bytes(40),
    "GGUF version 1 is not read": made([], [], version=1),
    "big-endian": made([], [], version=3 << 24),
    "tensors cannot be in a file": made([], [], counts=(2**40, 0)),
    "keys cannot be in a file": made([], [], counts=(0, 2**63)),
    "a key is empty": made([key("", U8, b"\0")], []),
    "is longer than 65,535": made([struct.pack("<Q", 2**16) + bytes(2**16)], []),
    "and the file ends at": made([struct.pack("<Q", 60_000)], []),
    "a key is not UTF-8": made([key(b"\xff", U8, b"\0")], []),
    "the key 'k' occurs twice": made([key("k", U8, b"\0")] * 2, []),
    "unknown value type 13": made([key("k", 13, b"")], []),
    "a truth value other than": made([key("k", BOOL, b"\x02")], []),
    "'k' is not UTF-8": made([key("k", STRING, text(b"\xff"))], []),
    "'k' takes 1,152,921,504,606,846,976 bytes": made([key("k", STRING, struct.pack("<Q", 2**60))], []),
    "array of arrays": made([key("k", ARRAY, array(ARRAY, 1, array(U8, 0)))], []),
    "unknown element type 99": made([key("k", ARRAY, array(99, 1))], []),
    "'k' takes 4,611,686,018,427,387,904 bytes": made([key("k", ARRAY, array(U32, 2**60))], []),
    "more than the file has room for": made([key("k", ARRAY, array(STRING, 2**61))], []),
    "a text of 'k' takes": made([key("k", ARRAY, array(STRING, 2, text("x") + struct.pack("<Q", 2**62)))], []),
    "is not a power of two": made([key("general.alignment", U32, struct.pack("<I", 24))], []),
    "has 5 dimensions": made([], [tensor("a", [1] * 5)], bytes(32)),
    "the tensor 'a' occurs twice": made([], [ONE, tensor("a", [4], offset=32)], bytes(64)),
    "unknown type 4 ": made([], [tensor("a", [4], kind=4)], bytes(32)),
    "2^63 elements or more": made([], [tensor("a", [2**32, 2**32])], bytes(32)),
    "no multiple of 32": made([], [tensor("a", [33], kind=8)], bytes(64)),
    "after the one before, it is at 32": made([], [ONE, tensor("b", [4], offset=16)], bytes(64)),
    "past the end of the file": made([], [tensor("a", [4096])], bytes(32)),
}


def read(content: bytes, directory: Path) -> Any:
    path = directory / "model.gguf"
    path.write_bytes(content)
    return read_gguf_header(path)


@pytest.mark.parametrize("rule", HOSTILE)
def test_each_rule_has_its_refusal(rule: str, tmp_path: Path) -> None:
    """A file that breaks one rule is refused with the file's name, an offset and that rule."""
    with pytest.raises(ModelFileError) as caught:
        read(HOSTILE[rule], tmp_path)
    assert rule in str(caught.value)
    assert "model.gguf: at byte " in str(caught.value)


def test_sizes_that_wrap_in_64_bits_do_not_wrap_here(tmp_path: Path) -> None:
    """2^32 x 2^32 x 4 elements are 0 modulo 2^64; the reader still sees that they do not fit."""
    with pytest.raises(ModelFileError, match=r"2\^63"):
        read(made([], [tensor("a", [2**32, 2**32, 4])], bytes(32)), tmp_path)


def test_block_sizes_are_those_of_ggml() -> None:
    """Every row of the table has the gguf package's name, block and bytes for that type."""
    renamed = {
        "f32": "fp32",
        "f16": "fp16",
        "f64": "fp64",
        "i8": "int8",
        "i16": "int16",
        "i32": "int32",
        "i64": "int64",
    }
    for number, (name, elements, nbytes) in BLOCKS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert gguf.GGML_QUANT_SIZES[kind] == (elements, nbytes)
        assert renamed.get(kind.name.lower(), kind.name.lower()) == name


def written_by_the_package(path: Path, shapes: dict[str, list[int]], *, alignment: int = 32) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    writer.add_token_list([f"token {number}" for number in range(50)])
    writer.add_array("numbers", list(range(5)))
    writer.add_array("many", [0.5] * (MAX_KEPT_NUMBERS + 1))
    writer.add_bool("flag", True)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, np.float32 if len(name) % 2 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SHAPES = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6), st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=5
)


@settings(deadline=None, max_examples=20)
@given(SHAPES, st.sampled_from([32, 64, 4096]))
def test_reads_what_the_package_writes(shapes: dict[str, list[int]], alignment: int) -> None:
    """Names, shapes, types and places are those that gguf's own reader finds; long arrays are counted, not kept."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        written_by_the_package(path, shapes, alignment=alignment)
        header = read_gguf_header(path)
        oracle = gguf.GGUFReader(path)
        theirs = [(t.name, tuple(t.shape.tolist())[::-1], t.n_bytes, t.data_offset) for t in oracle.tensors]
        ours = [(t.spec.name, t.spec.shape, t.spec.nbytes, header.data_start + t.begin) for t in header.tensors]
        assert ours == theirs
        assert header.array_lengths["tokenizer.ggml.tokens"] == 50
        assert header.metadata["numbers"] == (0, 1, 2, 3, 4)
        assert header.metadata["flag"] is True
        assert "many" not in header.metadata
        del oracle


VALID = made(
    [
        key("general.architecture", STRING, text("llama")),
        key("tokens", ARRAY, array(STRING, 2, text("ab") + text("c"))),
        key("numbers", ARRAY, array(U32, 2, bytes(8))),
    ],
    [ONE, tensor("b", [32, 2], kind=8, offset=32)],
    bytes(128),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=5), st.integers(0, 140))
def test_mutated_files_never_crash(mutations: list[tuple[int, int]], cut: int) -> None:
    """A damaged file is read or refused with ModelFileError; what is read lies inside the file."""
    content = bytearray(VALID)
    for place, value in mutations:
        content[place] = value
    with tempfile.TemporaryDirectory() as directory, suppress(ModelFileError):
        header = read(bytes(content[: len(content) - cut]), Path(directory))
        assert all(header.data_start + t.end <= len(content) - cut for t in header.tensors)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_crash(tail: bytes) -> None:
    """Any bytes after the magic are read or refused with ModelFileError, nothing else."""
    with tempfile.TemporaryDirectory() as directory, suppress(ModelFileError):
        read(b"GGUF\x03\0\0\0" + tail, Path(directory))


def test_an_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    """A GGUF file of another architecture is refused with those that are known."""
    header = read(made([key("general.architecture", STRING, text("mamba"))], []), tmp_path)
    with pytest.raises(UnknownNameError, match=r"'mamba' is not known \(known: llama, .*gemma3"):
        config_from_gguf(header, where=tmp_path)


def test_metadata_without_sizes_are_refused(tmp_path: Path) -> None:
    """A llama file that does not say its sizes is incomplete, not a crash."""
    keys = [key("general.architecture", STRING, text("llama"))]
    header = read(made(keys, [tensor("token_embd.weight", [4, 8])], bytes(128)), tmp_path)
    with pytest.raises(ModelFileError, match="embedding_length"):
        config_from_gguf(header, where=tmp_path)
