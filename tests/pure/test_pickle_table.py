"""The reader of pickled tables of tensors: nothing is called, nothing grows, whatever the pickle says."""

import pickle
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.checkpoints import pickle_table
from brim.checkpoints.pickle_table import MAX_INSTRUCTIONS, PickledTensor, table_of
from brim.errors import ModelFileError
from brim.units import MIB

TABLE = (
    b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(X\x01\x00\x00\x00aq\x02ctorch._utils\n_rebuild_tensor_v2\nq\x03(("
    b"X\x07\x00\x00\x00storageq\x04ctorch\nFloatStorage\nq\x05X\x01\x00\x00\x000q\x06X\x03\x00\x00\x00cpuq\x07K\x06tq\x08Q"
    b"K\x00K\x02K\x03\x86q\tK\x03K\x01\x86q\n\x89h\x00)Rq\x0btq\x0cRq\ru."
)
"""{"a": two rows of three FP32}, as torch.save writes it."""


class Calls:
    """Calls this function with these arguments when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


def nested(depth: int) -> bytes:
    """A tuple of two of a tuple of two of ...: a few bytes, 2^depth leaves to whoever walks it."""
    return b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * depth


HOSTILE: dict[str, tuple[str, bytes]] = {
    "code": ("it calls __builtin__.exec", pickle.dumps({"a": Calls(exec, "raise SystemExit")}, 2)),
    "a terabyte": ("it calls __builtin__.bytearray", pickle.dumps(Calls(bytearray, 10**12), 2)),
    "an ordered one": ("'a', which is no tensor", pickle.dumps(OrderedDict(a=1), 2)),
    "protocol 4": ("the instruction FRAME", pickle.dumps({"a": 1}, 4)),
    "no end": ("damaged", b"\x80\x02}q\x00"),
    "nothing": ("damaged", b""),
    "too little on the stack": ("damaged", b"\x80\x02\x86."),
    "no mark": ("damaged", b"\x80\x02}K\x01t."),
    "a memo that is not there": ("damaged", b"\x80\x02h\x05."),
    "a key that hashes for ever": ("a key that is no text", b"\x80\x02}q\x01" + nested(60)[2:] + b"h\x01h\x00K\x01s."),
    "a name twice": ("'a' twice", b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u."),
    "no table": ("no tensors by name", b"\x80\x02K\x01."),
    "no tensor": ("'a', which is no tensor", b"\x80\x02}X\x01\x00\x00\x00aK\x01s."),
    "another storage": ("a storage of another kind", TABLE.replace(b"FloatStorage", b"QInt8Storage")),
    "a shape below zero": ("no list of sizes", TABLE.replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86", 1)),
    "a shape of truths": ("no list of sizes", TABLE.replace(b"K\x02K\x03\x86", b"\x88K\x03\x86", 1)),
}  # fmt: skip


def test_a_table_is_read() -> None:
    """What torch.save wrote comes back by name, type, place and shape."""
    assert table_of(TABLE, where="x.bin") == {"a": PickledTensor("fp32", "0", 0, (2, 3), (3, 1))}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_table_is_refused(name: str) -> None:
    """Each in its own words, with nothing called and next to nothing held."""
    match, content = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match=f"x.bin .*{match}"):
            table_of(content, where="x.bin")
        assert tracemalloc.get_traced_memory()[1] < MIB + 4 * len(content)
    finally:
        tracemalloc.stop()


def test_instructions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle of more instructions than any shard's table is refused at that one; each may make an empty dictionary,
    so what is held stays within 512 MiB."""
    assert MAX_INSTRUCTIONS * (sys.getsizeof({}) + 16) < 512 * MIB / 4
    monkeypatch.setattr(pickle_table, "MAX_INSTRUCTIONS", 100)
    with pytest.raises(ModelFileError, match="more than 100 instructions"):
        table_of(b"\x80\x02" + b"}" * 101, where="x.bin")


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, len(TABLE) - 1), st.integers(0, 255)), max_size=6), st.binary(max_size=40))
def test_damaged_tables_are_read_or_refused(changes: list[tuple[int, int]], tail: bytes) -> None:
    """A sound table with some bytes changed and others before its end is read, or refused in our words."""
    content = bytearray(TABLE[:-1] + tail + b".")
    for place, value in changes:
        content[place] = value
    try:
        table_of(bytes(content), where="x.bin")
    except ModelFileError:
        return
