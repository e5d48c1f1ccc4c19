"""Reads the header of a GGUF file: metadata, and names, shapes, types and places of its tensors. No weights, no numpy.

The file is untrusted: every count, length and offset is checked against the file before it is used. How this differs
from `gguf.GGUFReader` 0.19, which lacks those checks: bounded dimensions and arrays, no nested arrays, sizes that
cannot wrap, every tensor inside the file; and long arrays (vocabularies of megabytes) are skipped, not read.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; bounds as in ggml/src/gguf.cpp.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from brim.errors import ModelFileError
from brim.models.files import file_size, refusal, unreadable
from brim.models.safetensors_header import TensorEntry
from brim.models.spec import TensorSpec

MAX_TENSORS = 2**17
MAX_KEYS = 2**16
"""Bounds of our own, far above any real file: what they limit is kept in memory."""
MAX_NAME_BYTES = 2**16 - 1
MAX_DIMS = 4
MAX_KEPT_BYTES = 2**16
"""Longer texts (a chat template, say) and arrays of more numbers than `MAX_KEPT_NUMBERS` are checked and skipped."""
MAX_KEPT_NUMBERS = 4096
_MAX_ELEMENTS = 2**63
_BUFFER_BYTES = 2**20

Value = int | float | bool | str | tuple[int | float | bool, ...]

BLOCKS: Mapping[int, tuple[str, int, int]] = {
    0: ("fp32", 1, 4), 1: ("fp16", 1, 2), 30: ("bf16", 1, 2), 28: ("fp64", 1, 8),
    24: ("int8", 1, 1), 25: ("int16", 1, 2), 26: ("int32", 1, 4), 27: ("int64", 1, 8),
    2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34), 9: ("q8_1", 32, 40),
    10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144), 13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210), 15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98), 19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136),
    29: ("iq1_m", 256, 56), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
}  # fmt: skip
"""ggml type -> (Brim's name, elements of one block, bytes of one block)."""

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Value type of a scalar -> its `struct` code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What the front of a GGUF file says, checked."""

    data_start: int
    """Offset in the file of the first tensor's first byte."""
    tensors: tuple[TensorEntry, ...]
    """In the order of their bytes; shapes as torch writes them, outermost first."""
    metadata: Mapping[str, Value]
    """Scalars, texts and short arrays of numbers; what is longer is not here."""
    array_lengths: Mapping[str, int]
    """Elements of every array, kept or skipped."""


def read_gguf_header(path: Path) -> GgufHeader:
    """The checked header of this file. Raises ModelFileError."""
    size = file_size(path)
    try:
        with path.open("rb", buffering=_BUFFER_BYTES) as file:
            return _Reader(file, size, path).header()
    except OSError as error:
        raise unreadable(path, error) from None


class _Reader:
    """A place in the file, and the bounds that nothing may pass."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file = file
        self._size = size
        self._path = path
        self._offset = 0
        self._metadata: dict[str, Value] = {}
        self._array_lengths: dict[str, int] = {}

    def header(self) -> GgufHeader:
        num_tensors, num_keys = self._counts()
        for _ in range(num_keys):
            self._key_and_value()
        alignment = self._alignment()
        infos = [self._tensor_info() for _ in range(num_tensors)]
        data_start = -(-self._offset // alignment) * alignment
        return GgufHeader(
            data_start=data_start,
            tensors=self._placed(infos, data_start, alignment),
            metadata=self._metadata,
            array_lengths=self._array_lengths,
        )

    def _counts(self) -> tuple[int, int]:
        if self._take(4, "the magic") != b"GGUF":
            raise self._refusal("the file does not begin with 'GGUF'", at=0)
        version = self._number("I", "the version")
        if version not in (2, 3):
            why = " (it is big-endian)" if version and version % 2**16 == 0 else ""
            raise self._refusal(f"GGUF version {version}{why} is not read; versions 2 and 3 in little-endian are", at=4)
        num_tensors, num_keys = self._number("Q", "the tensor count"), self._number("Q", "the key count")
        # The smallest tensor info takes 24 bytes, the smallest key with its value 13.
        for count, least, most, what in ((num_tensors, 24, MAX_TENSORS, "tensors"), (num_keys, 13, MAX_KEYS, "keys")):
            if count > most or count * least > self._size:
                raise self._refusal(f"{count:,} {what} cannot be in a file of {self._size:,} bytes", at=8)
        return num_tensors, num_keys

    def _key_and_value(self) -> None:
        at = self._offset
        key = self._text("a key", MAX_NAME_BYTES)
        if not key:
            raise self._refusal("a key is empty", at=at)
        if key in self._metadata or key in self._array_lengths:
            raise self._refusal(f"the key {key!r} occurs twice", at=at)
        kind = self._number("I", f"the type of {key!r}")
        if kind in _NUMBERS:
            self._metadata[key] = self._numbers(kind, 1, key)[0]
        elif kind == _STRING:
            self._text_value(key)
        elif kind == _ARRAY:
            self._array(key)
        else:
            raise self._refusal(f"{key!r} has unknown value type {kind}")

    def _text_value(self, key: str) -> None:
        length = self._number("Q", f"the length of {key!r}")
        if length > MAX_KEPT_BYTES:
            self._skip(length, repr(key))
        else:
            self._metadata[key] = self._decoded(self._take(length, repr(key)), repr(key))

    def _array(self, key: str) -> None:
        kind = self._number("I", f"the element type of {key!r}")
        length = self._number("Q", f"the length of {key!r}")
        self._array_lengths[key] = length
        if kind in _NUMBERS:
            if length <= MAX_KEPT_NUMBERS:
                self._metadata[key] = self._numbers(kind, length, key)
            else:
                self._skip(length * struct.calcsize(_NUMBERS[kind]), repr(key))
        elif kind == _STRING:
            self._skip_texts(length, key)
        elif kind == _ARRAY:
            raise self._refusal(f"{key!r} is an array of arrays, which no model needs and readers recurse into")
        else:
            raise self._refusal(f"{key!r} has unknown element type {kind}")

    def _skip_texts(self, count: int, key: str) -> None:
        if count * 8 > self._size - self._offset:
            raise self._refusal(f"{key!r} declares {count:,} texts, more than the file has room for")
        # A vocabulary is 10^5 texts: this loop is most of the time a header takes, so it calls nothing of ours.
        read, seek, offset, size = self._file.read, self._file.seek, self._offset, self._size
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            offset += 8 + length
            if offset > size:
                raise self._refusal(
                    f"a text of {key!r} takes {length:,} bytes, and the file ends at {size:,}", at=offset - length
                )
            seek(length, 1)
        self._offset = offset

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int, int]:
        """Name, shape, type, offset from the data's start, and where in the file this was said."""
        at = self._offset
        name = self._text("a tensor's name", MAX_NAME_BYTES)
        num_dims = self._number("I", f"the dimensions of {name!r}")
        if num_dims > MAX_DIMS:
            raise self._refusal(f"tensor {name!r} has {num_dims} dimensions; {MAX_DIMS} is the most", at=at)
        shape = tuple(self._number("Q", f"the shape of {name!r}") for _ in range(num_dims))
        kind = self._number("I", f"the type of {name!r}")
        return name, shape, kind, self._number("Q", f"the offset of {name!r}"), at

    def _placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int, int]], data_start: int, alignment: int
    ) -> tuple[TensorEntry, ...]:
        """The tensors one after another, each at its aligned place and inside the file."""
        names: set[str] = set()
        entries, expected = [], 0
        for name, shape, kind, begin, at in infos:
            if name in names:
                raise self._refusal(f"the tensor {name!r} occurs twice", at=at)
            names.add(name)
            spec = self._spec(name, shape, kind, at)
            if begin != expected:
                raise self._refusal(
                    f"tensor {name!r} is said to be at {begin}; after the one before, it is at {expected}", at=at
                )
            end = begin + spec.nbytes
            if data_start + end > self._size:
                raise self._refusal(
                    f"tensor {name!r} ends at {data_start + end:,}, past the end of the file ({self._size:,})", at=at
                )
            entries.append(TensorEntry(spec=spec, begin=begin, end=end))
            expected = -(-end // alignment) * alignment
        return tuple(entries)

    def _spec(self, name: str, shape: tuple[int, ...], kind: int, at: int) -> TensorSpec:
        if kind not in BLOCKS:
            known = ", ".join(row[0] for row in BLOCKS.values())
            raise self._refusal(f"tensor {name!r} has unknown type {kind} (known: {known})", at=at)
        brim_name, block_elements, block_bytes = BLOCKS[kind]
        if prod(shape) >= _MAX_ELEMENTS:
            raise self._refusal(f"tensor {name!r} overflows: its shape has 2^63 elements or more", at=at)
        if (shape[0] if shape else 1) % block_elements:
            rule = f"rows of tensor {name!r} have {shape[0] if shape else 1} elements, no multiple of {block_elements}"
            raise self._refusal(f"{rule}, the block of {brim_name}", at=at)
        nbytes = prod(shape) // block_elements * block_bytes
        return TensorSpec(name=name, shape=shape[::-1], dtype=brim_name, nbytes=nbytes)

    def _alignment(self) -> int:
        alignment = self._metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self._refusal(f"general.alignment {alignment!r} is not a power of two")
        return alignment

    def _numbers(self, kind: int, count: int, key: str) -> tuple[int | float | bool, ...]:
        code = _NUMBERS[kind]
        values = struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(code), repr(key)))
        if kind != _BOOL:
            return values
        if any(value > 1 for value in values):
            raise self._refusal(f"{key!r} has a truth value other than 0 and 1")
        return tuple(map(bool, values))

    def _number(self, code: str, what: str) -> int:
        return int(struct.unpack(f"<{code}", self._take(struct.calcsize(code), what))[0])

    def _text(self, what: str, max_bytes: int) -> str:
        length = self._number("Q", f"the length of {what}")
        if length > max_bytes:
            raise self._refusal(f"{what} of {length:,} bytes is longer than {max_bytes:,}")
        return self._decoded(self._take(length, what), what)

    def _decoded(self, text: bytes, what: str) -> str:
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise self._refusal(f"{what} is not UTF-8") from None

    def _take(self, count: int, what: str) -> bytes:
        self._check_room(count, what)
        self._offset += count
        taken = self._file.read(count)
        if len(taken) < count:
            raise self._refusal(f"{what} is cut short: the file shrank while it was read")
        return taken

    def _skip(self, count: int, what: str) -> None:
        self._check_room(count, what)
        self._offset += count
        self._file.seek(self._offset)

    def _check_room(self, count: int, what: str) -> None:
        if count > self._size - self._offset:
            raise self._refusal(f"{what} takes {count:,} bytes, and the file ends at {self._size:,}")

    def _refusal(self, rule: str, *, at: int | None = None) -> ModelFileError:
        return refusal(self._path, self._offset if at is None else at, rule)
