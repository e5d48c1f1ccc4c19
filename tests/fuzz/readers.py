"""Readers of untrusted files as functions of bytes: each reads them or refuses them in our words.

Anything else, a crash or an exception of another kind, is a fault. `SEEDS` are sound files to start from.
"""

import io
import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from brim.checkpoints.archive import entries
from brim.checkpoints.pickle_table import table_of
from brim.errors import BrimError
from brim.models.directory import stored_tensors
from brim.models.gguf_header import read_gguf_header
from brim.models.safetensors_header import read_header

Reader = Callable[[bytes, Path], None]
_PICKLE = (
    b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(X\x01\x00\x00\x00aq\x02ctorch._utils\n_rebuild_tensor_v2\nq\x03(("
    b"X\x07\x00\x00\x00storageq\x04ctorch\nFloatStorage\nq\x05X\x01\x00\x00\x000q\x06X\x03\x00\x00\x00cpuq\x07K\x06tq\x08Q"
    b"K\x00K\x02K\x03\x86q\tK\x03K\x01\x86q\n\x89h\x00)Rq\x0btq\x0cRq\ru."
)


def read_safetensors(content: bytes, place: Path) -> None:
    _written(content, place / "model.safetensors", read_header)


def read_gguf(content: bytes, place: Path) -> None:
    _written(content, place / "model.gguf", read_gguf_header)


def read_index(content: bytes, place: Path) -> None:
    (place / "a.safetensors").write_bytes(SEEDS["safetensors"])
    _written(content, place / "model.safetensors.index.json", lambda path: stored_tensors(path.parent))


def read_pickle(content: bytes, place: Path) -> None:
    with suppress(BrimError):
        table_of(content, where=place)


def read_archive(content: bytes, place: Path) -> None:
    _written(content, place / "pytorch_model.bin", lambda path: entries(path, kind="save it anew"))


def _written(content: bytes, path: Path, read: Callable[[Path], object]) -> None:
    path.write_bytes(content)
    with suppress(BrimError):
        read(path)


def _safetensors() -> bytes:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(24)


def _gguf() -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    keys = (
        text(b"general.alignment") + struct.pack("<II", 4, 32) + text(b"k") + struct.pack("<IIQ", 9, 8, 1) + text(b"v")
    )
    front = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + keys + text(b"a") + struct.pack("<IQIQ", 1, 8, 0, 0)
    return front + bytes(-len(front) % 32) + bytes(32)


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/data.pkl", _PICKLE)
        archive.writestr("model/data/0", bytes(24))
    return buffer.getvalue()


SEEDS: Mapping[str, bytes] = {
    "safetensors": _safetensors(),
    "gguf": _gguf(),
    "index": b'{"metadata": {"total_size": 24}, "weight_map": {"a": "a.safetensors"}}',
    "pickle": _PICKLE,
    "archive": _archive(),
}
READERS: Mapping[str, Reader] = {
    "safetensors": read_safetensors,
    "gguf": read_gguf,
    "index": read_index,
    "pickle": read_pickle,
    "archive": read_archive,
}
