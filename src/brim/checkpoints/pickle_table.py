"""The table of tensors in a pickle that torch.save wrote of a model's weights, without running the pickle.

A pickle is a program for a stack machine. This one knows the instructions that such a table takes and nothing to call:
names of functions become records, `persistent ids` become storages, dictionaries have texts as keys. Whatever else a
pickle says is refused, so no more is made than its bytes hold. How this differs from torch's own restricted unpickler
(weights_only): that one calls (bytearray of any size, for one), and has had ways out (CVE-2025-32434, CVE-2026-24747).
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from brim.errors import ModelFileError

MAX_INSTRUCTIONS = 2**20
"""Far above any shard's (some 30 a tensor); each keeps a hundred bytes at most."""
_TYPES = {
    "FloatStorage": "fp32", "HalfStorage": "fp16", "BFloat16Storage": "bf16", "DoubleStorage": "fp64",
    "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16",
    "IntStorage": "int32", "LongStorage": "int64",
}  # fmt: skip
_CONSTANTS = ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1")
_VALUES: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict,
}  # fmt: skip
_SIZED = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True, slots=True)
class _Named:
    """A function or a class, by its name."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as the pickle tells of it."""

    dtype: str
    storage: str
    """The name of its bytes in the archive."""
    begin: int
    """Elements before its first one there."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Where a run of values begins on the stack."""


class _Refused(Exception):
    """With what the pickle says and a table does not."""


def table_of(pickle: bytes, *, where: object) -> dict[str, PickledTensor]:
    """Name -> tensor. Raises ModelFileError for whatever is not a table of tensors."""
    try:
        made = _run(pickle)
    except _Refused as refused:
        raise ModelFileError(f"{where} does not hold tensors alone, or is damaged: {refused}") from None
    except (ValueError, IndexError, KeyError, AttributeError, OverflowError) as error:
        raise ModelFileError(f"{where} does not hold tensors alone, or is damaged: {str(error)[:100]}") from None
    if not isinstance(made, dict):
        raise ModelFileError(f"{where} holds no tensors by name; save the model with model.save_pretrained(directory)")
    for name, value in made.items():
        if not isinstance(value, PickledTensor):
            raise ModelFileError(f"{where} holds {name!r}, which is no tensor; save the model's weights alone")
    return made


def _run(pickle: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(BytesIO(pickle))):
        name = opcode.name
        if count > MAX_INSTRUCTIONS:
            raise _Refused(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        if name == "STOP":
            return stack.pop()
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name != "PROTO":
            _step(name, argument, stack)
    raise _Refused("it has no end")


def _step(name: str, argument: Any, stack: list[Any]) -> None:
    if name in _CONSTANTS:
        stack.append(argument)
    elif name in _VALUES:
        stack.append(_VALUES[name]())
    elif name == "MARK":
        stack.append(_Mark())
    elif name == "GLOBAL":
        stack.append(_Named(argument))
    elif name == "TUPLE":
        stack.append(tuple(_run_of(stack)))
    elif name in _SIZED:
        stack.append(tuple(_taken(stack, _SIZED[name])))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_made(function, arguments))
    elif name in ("SETITEM", "SETITEMS"):
        items = _taken(stack, 2) if name == "SETITEM" else _run_of(stack)
        _set(stack[-1], items)
    elif name == "BUILD":
        stack.pop()  # what a state_dict keeps beside its tensors: versions of modules
    else:
        raise _Refused(f"the instruction {name}")


def _taken(stack: list[Any], count: int) -> list[Any]:
    values = stack[-count:]
    if len(values) < count:
        raise _Refused("it takes more than is there")
    del stack[-count:]
    return values


def _run_of(stack: list[Any]) -> list[Any]:
    """What lies above the last mark, off the stack with it."""
    values: list[Any] = []
    while not isinstance(value := stack.pop(), _Mark):
        values.append(value)
    return values[::-1]


def _set(table: Any, items: list[Any]) -> None:
    if not isinstance(table, dict) or len(items) % 2:
        raise _Refused("items of what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):
            raise _Refused("a key that is no text")
        if key in table:
            raise _Refused(f"{key[:80]!r} twice")
        table[key] = value


def _storage(told: Any) -> _Storage:
    match told:
        case ("storage", _Named(name), str(key), str(), int()) if name.removeprefix("torch ") in _TYPES:
            return _Storage(_TYPES[name.removeprefix("torch ")], key)
    raise _Refused("a storage of another kind; save the model as safetensors")


def _made(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Named("collections OrderedDict"), ():
            return {}
        case _Named("torch._utils _rebuild_parameter"), (PickledTensor() as tensor, *_):
            return tensor
        case _Named("torch._utils _rebuild_tensor_v2"), (
            _Storage(dtype, key),
            int(begin),
            tuple(shape),
            tuple(strides),
            *_,
        ):
            return PickledTensor(dtype, key, _size(begin), tuple(map(_size, shape)), tuple(map(_size, strides)))
        case _Named(name), _:
            raise _Refused(f"it calls {name.replace(' ', '.')[:80]}")
    raise _Refused("it calls what is no function")


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise _Refused("a shape that is no list of sizes")
    return value
