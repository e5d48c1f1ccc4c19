"""Reads the header of a safetensors file: names, shapes, dtypes and places of its tensors. No weights, no torch.

The file is untrusted. Every rule of the format has its own refusal, and nothing is allocated before its size is
checked against the file's. How this differs from the `safetensors` library: it needs no numpy or torch, it also refuses
duplicate keys (the format forbids them, parsers disagree), and its errors name file, offset and rule.
Format: https://github.com/huggingface/safetensors, README and src/tensor.rs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from brim.models.files import file_size, parse_json_object, refusal, unreadable
from brim.models.spec import TensorSpec

MAX_HEADER_BYTES = 100_000_000
MAX_READ_BYTES = 2**25
"""A bound of our own, for twice as many tensors as any model has in one file: what it limits is kept in memory."""
LENGTH_BYTES = 8
_MAX_BITS = 2**64

DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("fp4_e2m1", 4), "F6_E2M3": ("fp6_e2m3", 6), "F6_E3M2": ("fp6_e3m2", 6),
    "U8": ("uint8", 8), "I8": ("int8", 8),
    "F8_E5M2": ("fp8_e5m2", 8), "F8_E4M3": ("fp8_e4m3", 8), "F8_E8M0": ("fp8_e8m0", 8),
    "F8_E4M3FNUZ": ("fp8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("fp8_e5m2fnuz", 8),
    "I16": ("int16", 16), "U16": ("uint16", 16), "F16": ("fp16", 16), "BF16": ("bf16", 16),
    "I32": ("int32", 32), "U32": ("uint32", 32), "F32": ("fp32", 32),
    "C64": ("complex64", 64), "F64": ("fp64", 64), "I64": ("int64", 64), "U64": ("uint64", 64),
}  # fmt: skip
"""dtype code of the file -> (Brim's name, bits of one element)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor and where its bytes lie."""

    spec: TensorSpec
    begin: int
    """First byte, counted from the header's `data_start`."""
    end: int
    """One past the last byte, counted likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsHeader:
    """What the front of a safetensors file says, checked."""

    data_start: int
    """Offset in the file of the first tensor's first byte."""
    tensors: tuple[TensorEntry, ...]
    """In the order of their bytes."""
    metadata: Mapping[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """The checked header of this file. Raises ModelFileError."""
    size = file_size(path)
    try:
        with path.open("rb") as file:
            length = header_length(file.read(LENGTH_BYTES), total_bytes=size, where=path)
            text = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    return parse_header(text, total_bytes=size, where=path)


def header_length(prefix: bytes, *, total_bytes: int, where: object) -> int:
    """Bytes of the JSON that follows the file's first eight bytes. Raises ModelFileError."""
    if len(prefix) < LENGTH_BYTES:
        raise refusal(where, 0, f"{total_bytes} bytes are too few for the header's length, which takes 8")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise refusal(where, 0, f"the header's length, {length:,}, is over the format's limit of {MAX_HEADER_BYTES:,}")
    if LENGTH_BYTES + length > total_bytes:
        raise refusal(where, 0, f"the header's length, {length:,}, reaches past the end of the file ({total_bytes:,})")
    if length > MAX_READ_BYTES:
        raise refusal(where, 0, f"the header's length, {length:,}, is over the {MAX_READ_BYTES:,} that Brim reads")
    return length


def parse_header(text: bytes, *, total_bytes: int, where: object) -> SafetensorsHeader:
    """The checked header from its JSON `text` in a file of `total_bytes`. Raises ModelFileError."""
    if text[:1] != b"{":
        raise refusal(where, LENGTH_BYTES, "the header does not begin with '{'")
    fields = parse_json_object(text, where=where, start=LENGTH_BYTES)
    metadata = _metadata(fields.pop("__metadata__", {}), where)
    entries = [_entry(name, declared, where) for name, declared in fields.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    data_start = LENGTH_BYTES + len(text)
    _check_contiguous(entries, data_start, total_bytes, where)
    return SafetensorsHeader(data_start=data_start, tensors=tuple(entries), metadata=metadata)


def _metadata(declared: Any, where: object) -> Mapping[str, str]:
    if not isinstance(declared, dict) or not all(isinstance(value, str) for value in declared.values()):
        raise refusal(where, LENGTH_BYTES, "__metadata__ is not a map from text to text")
    return declared


def _entry(name: str, declared: Any, where: object) -> TensorEntry:
    if not _is_unicode(name):
        raise refusal(where, LENGTH_BYTES, f"the tensor name {name!r} is not valid Unicode")
    if not isinstance(declared, dict) or not {"dtype", "shape", "data_offsets"} <= declared.keys():
        raise refusal(where, LENGTH_BYTES, f"tensor {name!r} does not have dtype, shape and data_offsets")
    dtype, shape, offsets = declared["dtype"], declared["shape"], declared["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refusal(where, LENGTH_BYTES, f"tensor {name!r} has unknown dtype {dtype!r} (known: {', '.join(DTYPES)})")
    if not _are_sizes(shape):
        raise refusal(where, LENGTH_BYTES, f"tensor {name!r} has a shape that is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise refusal(where, LENGTH_BYTES, f"tensor {name!r} has data_offsets that are not two offsets")
    begin, end = offsets
    if end < begin:
        raise refusal(where, LENGTH_BYTES, f"tensor {name!r} ends at {end}, before it begins at {begin}")
    brim_name, element_bits = DTYPES[dtype]
    nbytes = _declared_bytes(name, shape, element_bits, where)
    if nbytes != end - begin:
        rule = f"tensor {name!r} needs {nbytes} bytes by shape and dtype, but its offsets give it {end - begin}"
        raise refusal(where, LENGTH_BYTES, rule)
    spec = TensorSpec(name=name, shape=tuple(shape), dtype=brim_name, nbytes=nbytes)
    return TensorEntry(spec=spec, begin=begin, end=end)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _are_sizes(value: Any) -> bool:
    # type() and not isinstance(): True is an int to Python and not to the format.
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**64 for size in value)


def _declared_bytes(name: str, shape: list[int], element_bits: int, where: object) -> int:
    bits = 1
    for size in chain(shape, (element_bits,)):
        bits *= size
        if bits >= _MAX_BITS:
            raise refusal(where, LENGTH_BYTES, f"tensor {name!r} overflows: its shape takes 2^64 bits or more")
    if bits % 8:
        raise refusal(where, LENGTH_BYTES, f"tensor {name!r} does not end at a whole byte ({bits} bits)")
    return bits // 8


def _check_contiguous(entries: list[TensorEntry], data_start: int, total_bytes: int, where: object) -> None:
    """No hole, no overlap, nothing after the last tensor: otherwise a second file could hide in this one."""
    end = 0
    for entry in entries:
        if entry.begin != end:
            kind = "overlaps the tensor before it" if entry.begin < end else "leaves a hole before it"
            raise refusal(where, data_start + entry.begin, f"tensor {entry.spec.name!r} {kind} (expected {end})")
        end = entry.end
    if data_start + end > total_bytes:
        raise refusal(where, total_bytes, f"the file is cut short: its tensors end at {data_start + end:,}")
    if data_start + end < total_bytes:
        raise refusal(where, data_start + end, f"{total_bytes - data_start - end:,} bytes follow the last tensor")
