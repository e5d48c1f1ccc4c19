"""`python -m brim.checkpoints.hdf5_listing FILE BEGIN`: the datasets of an HDF5 file as JSON, by the HDF5 library.

Run as a process of its own (`hdf5.py` starts it): the library is C, and has crashed on damaged files more than once.
What it takes is bounded here, and no weight passes through it. BEGIN: where the HDF5 data begin in FILE.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any, BinaryIO

import h5py

MAX_DATASETS = 2**15
MAX_NAME_CHARACTERS = 1024
MAX_PIECES = 2**17
"""Of all datasets together. Far above any model's; with them the listing stays within some tens of megabytes."""
_MEMORY_BYTES = 2**30
_PROCESSOR_S = 60


class _Part:
    """A file from a place on, as h5py wants a file object: read only."""

    def __init__(self, file: BinaryIO, begin: int) -> None:
        self._file, self._begin = file, begin

    def seek(self, offset: int, whence: int = 0) -> int:
        base = self._begin if whence == 0 else 0
        return self._file.seek(base + offset, whence) - self._begin

    def tell(self) -> int:
        return self._file.tell() - self._begin

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined]  # h5py asks for it; typing's BinaryIO lacks it

    def flush(self) -> None:
        pass


def listing(path: Path, begin: int) -> dict[str, Any]:
    """`datasets`: path, shape, dtype and place of each; `refused`: why the file is not one that Keras writes."""
    found: list[dict[str, Any]] = []
    pieces_left = MAX_PIECES
    with path.open("rb", buffering=0) as raw, h5py.File(_Part(raw, begin) if begin else path, "r") as file:

        def visit(name: str, node: Any) -> str | None:
            nonlocal pieces_left
            if len(name) > MAX_NAME_CHARACTERS:
                return f"a name of {len(name):,} characters, more than {MAX_NAME_CHARACTERS:,}"
            if not isinstance(node, h5py.Dataset):
                return None
            if len(found) == MAX_DATASETS:
                return f"more than {MAX_DATASETS:,} datasets"
            if (pieces := _count_pieces(node)) > pieces_left:
                return f"more than {MAX_PIECES:,} pieces"
            pieces_left -= pieces
            found.append(_described(name, node))
            return None

        # Links to other places and files are not followed by visititems; each dataset comes once.
        if refused := file.visititems(visit):
            return {"refused": f"it has {refused}"}
    return {"datasets": found}


def _described(name: str, node: Any) -> dict[str, Any]:
    settings = node.id.get_create_plist()
    layout = settings.get_layout()
    facts = {
        "name": name, "shape": list(node.shape or ()), "dtype": node.dtype.str, "kind": node.dtype.kind,
        "offset": node.id.get_offset(), "empty": node.shape is None,
        "elsewhere": bool(node.external) or layout == h5py.h5d.VIRTUAL,
    }  # fmt: skip
    if layout == h5py.h5d.CHUNKED and node.dtype.kind in "fiub":
        facts["piece_shape"] = list(node.chunks)
        facts["filters"] = [settings.get_filter(number)[0] for number in range(settings.get_nfilters())]
        facts["places"] = _places(node)
    return facts


def _count_pieces(node: Any) -> int:
    in_pieces = node.id.get_create_plist().get_layout() == h5py.h5d.CHUNKED
    return int(node.id.get_num_chunks()) if in_pieces else 0


def _places(node: Any) -> list[list[int]]:
    """Of the pieces in order: first byte, bytes, filters left out. Those that were never written are not there."""
    pieces = (node.id.get_chunk_info(number) for number in range(_count_pieces(node)))
    found = sorted(pieces, key=lambda piece: piece.chunk_offset)
    return [[piece.byte_offset, piece.size, piece.filter_mask] for piece in found]


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (_PROCESSOR_S, _PROCESSOR_S))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    try:
        sys.stdout.write(json.dumps(listing(Path(sys.argv[1]), int(sys.argv[2]))))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError) as error:
        sys.stdout.write(json.dumps({"refused": f"the HDF5 library does not read it: {str(error)[:200]}"}))
