"""Which tensors an HDF5 file holds, and where their bytes are.

The HDF5 library reads the file's structure in a process of its own (`hdf5_listing`): a crash there is a refusal here.
Weights are then read like those of any other file, once each is known to lie inside.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from brim.checkpoints.pieces import DEFLATE, MAX_PIECE_BYTES, SHUFFLE
from brim.errors import MissingPartError, ModelFileError
from brim.models.files import MAX_JSON_BYTES, file_size, parse_json_object, unreadable
from brim.models.pieces import Pieces

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_PATIENCE_S = 120
_TYPES = {
    "<f8": "fp64", "<f4": "fp32", "<f2": "fp16", "<i8": "int64", "<i4": "int32", "<i2": "int16", "|i1": "int8",
    "|u1": "uint8",
}  # fmt: skip


class Dataset(NamedTuple):
    """A numeric dataset."""

    name: str
    """Its path in the file."""
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int
    """Of its first byte, in the file; of its first piece's."""
    pieces: Pieces | None = None
    """Where its bytes are, if it is held in pieces."""


def datasets(path: Path, begin: int = 0, end: int | None = None) -> tuple[Dataset, ...]:
    """Those of the HDF5 data that lie at these bytes of the file, texts apart, in order of path.

    Raises ModelFileError for what is damaged or not as Keras writes it, MissingPartError without h5py.
    """
    end = file_size(path) if end is None else end
    with path.open("rb") as file:
        file.seek(begin)
        if file.read(len(SIGNATURE)) != SIGNATURE:
            raise ModelFileError(f"{path}: at byte {begin}: it does not begin as HDF5 does; it is damaged or no HDF5")
    found = _listing(path, begin)
    if refused := found.get("refused"):
        raise ModelFileError(f"{path}: {refused}; save the model anew with Keras")
    numeric = [facts for facts in found["datasets"] if facts["kind"] in "fiub" and not facts["empty"]]
    return tuple(_dataset(facts, path, begin, end) for facts in sorted(numeric, key=lambda facts: str(facts["name"])))


def _listing(path: Path, begin: int) -> dict[str, Any]:
    # -P: a module of the directory that the user happens to be in is not to be run.
    command = [sys.executable, "-P", "-m", "brim.checkpoints.hdf5_listing", str(path.resolve()), str(begin)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise ModelFileError(f"{path}: the HDF5 library found no end of it in {_PATIENCE_S} s; it is damaged") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if b"No module named 'h5py'" in done.stderr:
        raise MissingPartError(f"{path}: reading Keras weights needs h5py; run: pip install 'brim[keras]'")
    if done.returncode or len(done.stdout) > MAX_JSON_BYTES:
        raise ModelFileError(f"{path}: the HDF5 library fails on it (exit {done.returncode}); the file is damaged")
    return parse_json_object(done.stdout, where=path, start=0)


def _dataset(facts: dict[str, Any], path: Path, begin: int, end: int) -> Dataset:
    name, shape, code = facts["name"], tuple(facts["shape"]), facts["dtype"]
    if facts["elsewhere"]:
        raise ModelFileError(f"{path}: dataset {name!r} has its data in other places, which Keras never writes")
    if code not in _TYPES:
        raise ModelFileError(
            f"{path}: dataset {name!r} holds {code}, which is none of {', '.join(_TYPES)}; save the model in FP32"
        )
    nbytes = int(code[-1])
    for size in shape:
        nbytes *= size
    if not nbytes:
        return Dataset(name, shape, _TYPES[code], 0, 0)
    if "places" in facts:
        pieces = _pieces(facts, shape, int(code[-1]), path, begin, end)
        return Dataset(name, shape, _TYPES[code], nbytes, pieces.places[0][0], pieces)
    if facts["offset"] is None:
        raise ModelFileError(f"{path}: dataset {name!r} has no bytes in the file; save the model anew with Keras")
    offset = begin + facts["offset"]
    if not begin <= offset <= end - nbytes:
        raise ModelFileError(
            f"{path}: dataset {name!r} ends at {offset + nbytes:,}, past the end of its file ({end:,})"
        )
    return Dataset(name, shape, _TYPES[code], nbytes, offset)


def _pieces(facts: dict[str, Any], shape: tuple[int, ...], itemsize: int, path: Path, begin: int, end: int) -> Pieces:
    """Of a dataset that is held in pieces. Raises ModelFileError for what is not read in them."""
    told, filters = f"{path}: dataset {facts['name']!r}", tuple(facts["filters"])
    anew = "rewrite the file with h5repack -l CONTI -f NONE"
    if len(shape) > 2 or set(filters) - {DEFLATE, SHUFFLE}:
        raise ModelFileError(f"{told} is held in pieces by a filter that is not known here; {anew}")
    (rows, columns), cut = (1, *shape)[-2:], (1, *facts["piece_shape"])[-2:]
    pieces = Pieces(
        shape=(rows, columns), piece_shape=(cut[0], cut[1]), itemsize=itemsize, filters=filters,
        places=tuple((begin + first, nbytes, left_out) for first, nbytes, left_out in facts["places"]),
    )  # fmt: skip
    if cut[0] * cut[1] * itemsize > MAX_PIECE_BYTES:
        raise ModelFileError(f"{told} is held in pieces of more than {MAX_PIECE_BYTES:,} bytes; {anew}")
    if len(pieces.places) != pieces.across * -(-rows // cut[0]):
        raise ModelFileError(f"{told} lacks pieces: {len(pieces.places)} are there; save the model anew with Keras")
    if any(
        not (begin <= first <= end - nbytes and nbytes <= 2 * MAX_PIECE_BYTES) for first, nbytes, _ in pieces.places
    ):
        raise ModelFileError(f"{told} has a piece past the file's end ({end:,}), or of too many bytes")
    return pieces
