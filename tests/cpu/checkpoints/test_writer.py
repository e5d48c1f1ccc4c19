"""Files written piece by piece, against the safetensors library; files read tile by tile."""

import errno
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from brim.checkpoints import reader
from brim.checkpoints.reader import tiles
from brim.checkpoints.writer import (
    bytes_of,
    create,
    header_bytes,
    in_file_order,
    index_of,
    plan_shards,
    safetensors_file,
    write_at,
)
from brim.errors import ModelFileError
from brim.models.directory import StoredTensor, stored_tensors, weight_files
from brim.models.safetensors_header import read_header
from brim.models.spec import TensorSpec

DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "int8": torch.int8, "uint8": torch.uint8,
    "int64": torch.int64, "bool": torch.bool, "complex64": torch.complex64,
}  # fmt: skip
NAMES = st.text(min_size=1, max_size=6).filter(
    lambda name: name.isprintable() and name != "__metadata__" and name.encode("utf-8", "ignore").decode() == name
)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DRAWN = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), min_size=1, max_size=6)
many = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
counter = itertools.count()


def fresh(tmp_path: Path) -> Path:
    """A new directory for each example."""
    path = tmp_path / str(next(counter))
    path.mkdir()
    return path


def random_bytes(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of any bit patterns, NaN among them."""
    count = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    values = torch.randint(0, 2 if dtype == "bool" else 256, (count,), dtype=torch.uint8)
    return values.view(DTYPES[dtype]).reshape(shape)


def spec_of(name: str, dtype: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype, nbytes=tensor.nbytes)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, specs: Sequence[TensorSpec], pieces: Iterable[tuple[str, int, Tensor]]) -> None:
    """A file of these tensors from pieces: of which tensor, from which byte of it on."""
    file = safetensors_file(path.name, specs)
    create(path, file, {})
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for name, begin, piece in pieces:
            write_at(descriptor, bytes_of(piece), file.places[name] + begin)
    finally:
        os.close(descriptor)
    assert path.stat().st_size == file.nbytes


@many
@given(DRAWN, st.randoms(use_true_random=False))
@example({"a": ("fp32", ()), "b": ("bool", (0, 3))}, None)
def test_the_library_reads_what_was_written(tmp_path: Path, drawn: dict[str, tuple[str, Any]], order: Any) -> None:
    """Pieces written in any order are, to the safetensors library, the tensors they were; so to ours."""
    path = fresh(tmp_path) / "model.safetensors"
    tensors = {name: random_bytes(dtype, shape) for name, (dtype, shape) in drawn.items()}
    pieces = [
        (name, 4 * number * tensor.itemsize, piece)
        for name, tensor in tensors.items()
        for number, piece in enumerate(tensor.reshape(-1).split(4))
    ]
    if order:
        order.shuffle(pieces)
    specs = [spec_of(name, drawn[name][0], tensor) for name, tensor in tensors.items()]
    write(path, specs, pieces)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(loaded[name]) == raw(tensor)
    with safetensors.safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    entries = read_header(path)
    assert {entry.spec for entry in entries.tensors} == set(specs)
    for entry in entries.tensors:
        assert (entries.data_start + entry.begin) % min(8, DTYPES[entry.spec.dtype].itemsize) == 0


@many
@given(DRAWN, st.integers(1, 7), st.integers(1, 5))
def test_tiles_are_the_tensor(tmp_path: Path, drawn: dict[str, tuple[str, Any]], size: int, row: int) -> None:
    """Tiles of whole rows, put together, are the bytes that the library wrote, whatever the tile's size."""
    path = fresh(tmp_path)
    tensors = {name: random_bytes(dtype, shape) for name, (dtype, shape) in drawn.items()}
    save_file(tensors, path / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "TILE_ELEMENTS", size)
        for stored in stored_tensors(path):
            tensor = tensors[stored.spec.name]
            row_elements = row if tensor.numel() % row == 0 and stored.spec.dtype in ("fp32", "bf16") else 1
            found = list(tiles(stored, row_elements=row_elements))
            assert b"".join(raw(tile) for tile in found) == raw(tensor)
            assert all(tile.dim() == 1 and 0 < tile.numel() <= max(size, row_elements) for tile in found)
            assert all(tile.numel() % row_elements == 0 for tile in found)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    """A file that loses its end, or goes away, after its header was read is refused with its name and the tensor's."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    (stored,) = stored_tensors(tmp_path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(ModelFileError, match=r"model\.safetensors: ended inside tensor 'a'"):
        list(tiles(stored))
    path.unlink()
    with pytest.raises(ModelFileError, match=r"model\.safetensors cannot be read: No such file"):
        list(tiles(stored))


def test_a_file_that_exists_is_not_written_over(tmp_path: Path) -> None:
    """Nor is what is in it touched."""
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        create(tmp_path / "x", safetensors_file("x", [spec_of("a", "fp32", torch.ones(4))]), {})
    assert (tmp_path / "x").read_text() == "mine"


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every write takes three bytes at most, and as many in all as the list says: a disk that runs full."""
    left = [10**6]
    plain = os.pwrite

    def short(descriptor: int, view: memoryview, offset: int) -> int:
        taken = plain(descriptor, view[: min(3, left[0])], offset)
        left[0] -= taken
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return taken

    monkeypatch.setattr(os, "pwrite", short)
    return left


def test_short_writes_are_continued(tmp_path: Path, room: list[int]) -> None:
    """Where the system takes fewer bytes than it is given, header and tensors are whole all the same."""
    tensor = torch.arange(100.0)
    write(tmp_path / "x", [spec_of("a", "fp32", tensor)], [("a", 0, tensor)])
    assert torch.equal(load_file(tmp_path / "x")["a"], tensor)


@pytest.mark.parametrize("bytes_left", [0, 20, 200])
def test_a_full_disk_stops_and_closes(tmp_path: Path, room: list[int], bytes_left: int) -> None:
    """A disk that runs full in the header or in a tensor is an error, and no file stays open."""
    room[0] = bytes_left
    tensor, before = torch.arange(100.0), len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "x", [spec_of("a", "fp32", tensor)], [("a", 0, tensor)])
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_constants_lie_at_their_places(tmp_path: Path) -> None:
    """What is known beforehand is in the file from the start; the rest is zeros until it is written."""
    shape, table = torch.tensor([3, 4]), torch.arange(5.0)
    file = safetensors_file("x", [spec_of("shape", "int64", shape), spec_of("table", "fp32", table)])
    create(tmp_path / "x", file, {"shape": raw(shape)})
    loaded = load_file(tmp_path / "x")
    assert loaded["shape"].tolist() == [3, 4]
    assert not loaded["table"].any()


SIZES = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=1, max_size=8)


@many
@given(SIZES, st.integers(1, 100))
def test_shards_are_a_partition(tmp_path: Path, sizes: list[list[int]], limit: int) -> None:
    """Each tensor is in one shard, groups stay together and in order, only a lone group passes the limit."""
    number = itertools.count()
    groups = [
        [TensorSpec(name=f"t{next(number)}", shape=(n,), dtype="int8", nbytes=n) for n in group] for group in sizes
    ]
    shards = plan_shards(groups, limit_bytes=limit)
    in_order = []
    for shard in shards:
        held = [group for group in groups if group[0] in shard.tensors]
        in_order += held
        assert {tensor for group in held for tensor in group} == set(shard.tensors)
        assert sum(tensor.nbytes for tensor in shard.tensors) <= limit or len(held) == 1
    assert in_order == groups
    directory = fresh(tmp_path)
    for shard in shards:
        create(directory / shard.name, shard, {})
    index = index_of(shards)
    if index is not None:
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for group in groups for tensor in group)
    assert (len(shards) == 1) == (index is None) == (shards[0].name == "model.safetensors")
    assert {file.name for file in weight_files(directory)} == {shard.name for shard in shards}
    assert {stored.spec for stored in stored_tensors(directory)} == {tensor for group in groups for tensor in group}
    assert sum(file.stat().st_size for file in weight_files(directory)) == sum(shard.nbytes for shard in shards)


def test_headers_are_the_librarys(tmp_path: Path) -> None:
    """A file of these tensors is, byte for byte, what the safetensors library writes."""
    tensors = {"b.weight": torch.ones(2, 3), "a.weight": torch.ones(3, dtype=torch.bfloat16), "c": torch.ones(1)}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    specs = in_file_order(spec_of(name, names[tensor.dtype], tensor) for name, tensor in tensors.items())
    content = header_bytes(specs) + b"".join(raw(tensors[spec.name]) for spec in specs)
    assert content == (tmp_path / "theirs").read_bytes()


def test_a_place_is_where_the_header_says(tmp_path: Path) -> None:
    """A scalar and an empty tensor have one tile and none."""
    save_file({"scalar": torch.tensor(2.5), "empty": torch.ones(0, 4)}, tmp_path / "model.safetensors")
    by_name: dict[str, StoredTensor] = {stored.spec.name: stored for stored in stored_tensors(tmp_path)}
    assert [tile.tolist() for tile in tiles(by_name["scalar"])] == [[2.5]]
    assert list(tiles(by_name["empty"])) == []
