"""Zip archives whose entries are read where they lie: PyTorch's .bin and Keras's .keras. Within bounds."""

import errno
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from brim.errors import ModelFileError
from brim.models.files import file_size

_DIRECTORY_BYTES = 2**23
"""Of the archive's table of contents, some 10^5 entries: each takes half a kilobyte when it is read."""
_TAIL_BYTES = 2**16 + 22
_END = struct.Struct("<4s8xIIH")
_END64_PLACE = struct.Struct("<4s4xQ4x")
_END64 = struct.Struct("<4s36xQQ")
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_OF_BAD_ARCHIVES = (
    zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, RuntimeError, struct.error,
)  # fmt: skip
"""What zipfile raises for a table of contents that lies: places before the file's start (ValueError, or
OSError with EINVAL), versions and flags that it does not know, numbers that end too early."""


def entries(path: Path, *, kind: str) -> Mapping[str, tuple[int, int]]:
    """Name -> (first byte, one past the last) of each file in the archive.

    Raises ModelFileError for what is no such archive, or compressed; `kind` says what it ought to be.
    """
    size = file_size(path)
    try:
        with path.open("rb") as file:
            _check_directory(file, size, path)
            with zipfile.ZipFile(file) as archive:
                listed = archive.infolist()
            places = {entry.filename: _place(file, entry) for entry in listed}
    except ModelFileError:
        raise
    except _OF_BAD_ARCHIVES as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # the disk's, not the file's
        raise ModelFileError(f"{path} is not a zip archive, or a damaged one; {kind}") from None
    if len(places) < len(listed):
        raise ModelFileError(f"{path}: the archive has two files of one name, which readers take for one or the other")
    if packed := [entry.filename for entry in listed if entry.compress_type != zipfile.ZIP_STORED]:
        raise ModelFileError(f"{path} is an archive of another kind: {packed[0]!r} is compressed; {kind}")
    if outside := [name for name, (begin, end) in places.items() if not 0 <= begin <= end <= size]:
        raise ModelFileError(f"{path}: {outside[0]!r} ends past the file's end ({size:,}); download it again")
    return places


def _check_directory(file: BinaryIO, size: int, path: Path) -> None:
    """Raises ModelFileError where the table of contents is larger than any model's: zipfile reads it whole."""
    begin = max(0, size - _TAIL_BYTES)
    file.seek(begin)
    tail = file.read(_TAIL_BYTES)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise zipfile.BadZipFile
    _, nbytes, _, _ = _END.unpack_from(tail, at)
    if at >= _END64_PLACE.size:
        signature, place = _END64_PLACE.unpack_from(tail, at - _END64_PLACE.size)
        if signature == b"PK\x06\x07" and place < size:
            file.seek(place)
            _, nbytes, _ = _END64.unpack(file.read(_END64.size))
    if nbytes > _DIRECTORY_BYTES:
        raise ModelFileError(f"{path}: a table of contents of {nbytes:,} bytes is more than any model has")


def _place(file: BinaryIO, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Its own header, whose name and extra field may have other lengths than the directory's, lies before its bytes."""
    file.seek(entry.header_offset)
    signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile
    begin = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    return begin, begin + entry.file_size
