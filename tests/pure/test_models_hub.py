"""Hub ids, against a small server that answers as the Hub does. Each question is asked by a process of its own, because
huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is imported."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

COMMIT = "c" * 40
CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 32, "tie_word_embeddings": True,
}  # fmt: skip
EMBEDDING = np.ones((32, 8), np.float32)
BIG = np.ones((600, 1000), np.float32)
FILES = {
    "owner/single": {
        "config.json": json.dumps(CONFIG),
        "model.safetensors": save({"model.embed_tokens.weight": EMBEDDING}),
    },
    "owner/sharded": {
        "config.json": json.dumps(CONFIG),
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}),
        "x.safetensors": save({"a": BIG}),
        "y.safetensors": save({"b": EMBEDDING}),
    },
    "owner/hostile": {
        "config.json": json.dumps(CONFIG),
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "../../other/secret/x.safetensors"}}),
    },
    "owner/damaged": {
        "config.json": json.dumps(CONFIG),
        "model.safetensors": (10**8).to_bytes(8, "little") + bytes(99),
    },
    "owner/wide": {
        "config.json": json.dumps(CONFIG),
        # A header longer than the first request asks for.
        "model.safetensors": save({f"layer.{number}.weight": np.ones(1, np.float32) for number in range(3000)}),
    },
    "owner/pickle": {"config.json": json.dumps(CONFIG), "pytorch_model.bin": b"pickle"},
    "owner/bare": {"README.md": "nothing"},
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """Answers HEAD and GET of /<repo>/resolve/<revision>/<file> and of the API's list of files."""

    protocol_version = "HTTP/1.1"
    requests: list[tuple[str, str, str | None]] = []  # noqa: RUF012  the handler's class is all that outlives a request

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        Hub.requests.append((self.command, self.path, self.headers.get("Range")))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":
            self._api(parts)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(200, b"")

    def _api(self, parts: list[str]) -> None:
        repo = "/".join(parts[2:4])
        if repo not in FILES:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        siblings = [self._sibling(name, content) for name, content in FILES[repo].items()]
        if "tree" in parts:
            tree = [{"type": "file", "path": s["rfilename"], "size": s["size"], "oid": s["blobId"]} for s in siblings]
            self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            return
        answer = {"id": repo, "sha": COMMIT, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    @staticmethod
    def _sibling(name: str, content: str | bytes) -> dict[str, Any]:
        raw = raw_bytes(content)
        return {"rfilename": name, "size": len(raw), "blobId": hashlib.sha1(raw).hexdigest()}

    def _file(self, repo: str, revision: str, name: str) -> None:
        if repo not in FILES:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Revision Not Found"})
        elif name not in FILES[repo]:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            content = raw_bytes(FILES[repo][name])
            self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        asked = self.headers.get("Range")
        extra = dict(headers or {})
        if asked and status == 200:
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            part = content[int(begin) : int(end) + 1 if end else None]
            extra["Content-Range"] = f"bytes {begin}-{int(begin) + len(part) - 1}/{len(content)}"
            status, content = 206, part
        self.send_response(status)
        for key, value in extra.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def raw_bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


ASK = """
import json, sys
from brim.errors import BrimError
from brim.models import describe, hub
try:
    if sys.argv[2] == "download":
        print(json.dumps(sorted(path.name for path in hub.download(sys.argv[1], None).iterdir())))
    else:
        spec = describe(sys.argv[1])
        print(json.dumps([spec.kind, spec.num_parameters, spec.tied_head, len(spec.tensors), str(spec.path)]))
except BrimError as error:
    print(json.dumps([type(error).__name__, error.exit_code, str(error)]))
"""


def ask(source: str, endpoint: str, home: Path, *, verb: str = "describe", offline: bool = False) -> list[Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-c", ASK, source, verb]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return list(json.loads(done.stdout))


def test_a_hub_model_is_described_from_config_and_header(endpoint: str, tmp_path: Path) -> None:
    """Config and header give the description; of the weights no byte more than the first request is asked for."""
    Hub.requests.clear()
    assert ask("owner/single", endpoint, tmp_path) == ["hub", 256, True, 1, "None"]
    asked = [
        ranged for command, path, ranged in Hub.requests if command == "GET" and path.endswith("model.safetensors")
    ]
    assert asked == ["bytes=0-131071"]


def test_shards_are_described_by_ranges(endpoint: str, tmp_path: Path) -> None:
    """A sharded model's headers are read without its weights, at a revision too."""
    assert ask("owner/sharded@main", endpoint, tmp_path) == ["hub", 600_000 + 256, True, 2, "None"]


def test_a_long_header_takes_a_second_request(endpoint: str, tmp_path: Path) -> None:
    """A header that the first request cuts is completed by a second."""
    assert ask("owner/wide", endpoint, tmp_path)[1:4] == [3000, True, 3000]


@pytest.mark.parametrize(
    ("source", "kind", "exit_code", "words"),
    [
        ("owner/absent", "UnknownNameError", 2, "the Hub has no model 'owner/absent'"),
        ("owner/single@nowhere", "UnknownNameError", 2, "no revision 'nowhere'"),
        ("owner/bare", "UnknownNameError", 2, "no config.json"),
        ("owner/hostile", "ModelFileError", 4, "not a plain name"),
        ("owner/damaged", "ModelFileError", 4, "reaches past the end"),
    ],
)
def test_refusals(source: str, kind: str, exit_code: int, words: str, endpoint: str, tmp_path: Path) -> None:
    """What the Hub lacks is an unknown name; what it has in bad shape is a bad model file."""
    answer = ask(source, endpoint, tmp_path)
    assert answer[:2] == [kind, exit_code]
    assert words in answer[2]


def test_downloaded_models_work_offline(endpoint: str, tmp_path: Path) -> None:
    """After a download the same id is described from the cache, by HF_HUB_OFFLINE or with no network."""
    assert ask("owner/single", endpoint, tmp_path, verb="download") == ["config.json", "model.safetensors"]
    for offline, place in ((True, endpoint), (False, "http://127.0.0.1:9")):
        kind, count, _, _, path = ask("owner/single", place, tmp_path, offline=offline)
        assert (kind, count) == ("hub", 256)
        assert Path(path, "model.safetensors").exists()


def test_what_is_not_cached_cannot_be_had_offline(endpoint: str, tmp_path: Path) -> None:
    """Offline, a model that the cache lacks is refused in words that name the reason."""
    assert "HF_HUB_OFFLINE forbids" in ask("owner/single", endpoint, tmp_path, offline=True)[2]
    assert "cannot be reached" in ask("owner/single", "http://127.0.0.1:9", tmp_path)[2]


def test_pickle_is_never_downloaded(endpoint: str, tmp_path: Path) -> None:
    """A repository whose weights are pickle is refused, and its pickle not fetched."""
    assert "pickle" in ask("owner/pickle", endpoint, tmp_path, verb="download")[2]
    assert not [path for _, path, _ in Hub.requests if path.endswith(".bin")]
