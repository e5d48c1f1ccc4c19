"""Every reader of untrusted files under changed bytes; `make fuzz` goes on for longer, guided by what they reach."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz.readers import READERS, SEEDS

from brim.checkpoints.archive import entries
from brim.checkpoints.pickle_table import table_of
from brim.models.gguf_header import read_gguf_header
from brim.models.safetensors_header import read_header

CHANGES = st.lists(st.tuples(st.integers(0, 2**16), st.sampled_from((0, 1, 127, 128, 255))), max_size=5)


@pytest.mark.parametrize("name", READERS)
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES, cut=st.integers(0, 40), tail=st.binary(max_size=40))
def test_damaged_files_are_read_or_refused(
    name: str, changes: list[tuple[int, int]], cut: int, tail: bytes, tmp_path: Path
) -> None:
    """A sound file with some bytes changed, cut and others after it, is read or refused in our words, nothing else."""
    content = bytearray(SEEDS[name])
    for place, value in changes:
        content[place % len(content)] = value
    READERS[name](bytes(content[: len(content) - cut]) + tail, tmp_path)


def test_the_seeds_are_sound(tmp_path: Path) -> None:
    """What fuzzing starts from is read to its end, so that changes reach all of a reader."""
    assert list(table_of(SEEDS["pickle"], where="seed")) == ["a"]
    for name in ("archive", "safetensors", "gguf"):
        (tmp_path / name).write_bytes(SEEDS[name])
    assert [entry.spec.name for entry in read_header(tmp_path / "safetensors").tensors] == ["a"]
    assert [entry.spec.name for entry in read_gguf_header(tmp_path / "gguf").tensors] == ["a"]
    assert set(entries(tmp_path / "archive", kind="")) == {"model/data.pkl", "model/data/0"}
