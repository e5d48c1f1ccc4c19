"""For every test: nothing reaches beyond this machine, and no answer that was kept before stands for a rehearsal."""

import socket
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine fails the test that makes it."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test reached for {address}; tests use this machine alone")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def no_kept_answers(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Predictions are kept in a place that this test has to itself."""
    place: list[Path] = []

    def directory() -> Path:
        place[:] = place or [tmp_path_factory.mktemp("answers")]
        return place[0]

    monkeypatch.setattr("brim.answers.answers_directory", directory)
