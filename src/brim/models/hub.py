"""What the Hugging Face Hub says about a model: its config and the headers of its safetensors, never its weights.

huggingface_hub does the talking, so HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT hold, and what is in its cache
needs no network. Headers are fetched as ranges of bytes and go through Brim's own checks.

Its HTTP client takes 0.2 s to import, so `brim.models` does not import this module before a Hub id is asked for.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: its client's, exported without a mark
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but loaded lazily, which mypy cannot see
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from brim.errors import ModelFileError, UnknownNameError, UsageError, did_you_mean
from brim.models import catalogue
from brim.models.config import read_config
from brim.models.directory import INDEX, SINGLE, check_index, parse_weight_map, read_tensors, shard_names, weight_files
from brim.models.files import read_json_object, refusal
from brim.models.safetensors_header import LENGTH_BYTES, SafetensorsHeader, header_length, parse_header
from brim.models.spec import TensorSpec
from brim.publish import check_room
from brim.units import Progress, no_progress

_FIRST_BYTES = 2**17
"""Holds most headers whole, so that one request does."""
_WEIGHTS = ["*.safetensors", INDEX]
_REST = ["*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """A model on the Hub."""

    config: dict[str, Any]
    tensors: tuple[TensorSpec, ...]
    """Empty where the repository has no safetensors, or where they cannot be asked for offline."""
    directory: Path | None
    """The cached snapshot, when all its weights are on this machine."""


def describe_on_hub(repo_id: str, revision: str | None) -> HubModel:
    """Config and file headers of this repository. Raises UnknownNameError, ModelFileError."""
    with _explained(repo_id, revision), _without_bars():
        is_local = not _is_reachable()
        config_file = Path(hf_hub_download(repo_id, "config.json", revision=revision, local_files_only=is_local))
        config = read_config(config_file)
        snapshot = config_file.parent
        if _has_weights(snapshot):
            return HubModel(config=config, tensors=read_tensors(snapshot), directory=snapshot)
        # The commit of the config: headers of a branch that moves meanwhile would be of another model.
        tensors = () if is_local else _remote_tensors(repo_id, snapshot.name)
        return HubModel(config=config, tensors=tensors, directory=None)


def download(repo_id: str, revision: str | None, *, progress: Progress = no_progress) -> Path:
    """The directory of this repository's weights, config and tokenizer in the Hub's cache; downloads what it lacks.

    Progress in bytes, a file at a time. Pickle files are never fetched. Raises UnknownNameError, ModelFileError,
    DoesNotFitError when the disk lacks the room.
    """
    with _explained(repo_id, revision), _without_bars():
        if _is_reachable():
            _fetch_missing(repo_id, revision, progress, _WEIGHTS + _REST)
        directory = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=_WEIGHTS + _REST, local_files_only=True)
        )
    if not weight_files(directory):
        raise UsageError(
            f"{repo_id} has no safetensors: its weights are pickle (.bin), which can run code when read, or absent; "
            "choose a repository with safetensors, or convert it where you trust it"
        )
    return directory


def download_tokenizer(repo_id: str, revision: str | None) -> Path:
    """As `download`, without the weights."""
    with _explained(repo_id, revision), _without_bars():
        if _is_reachable():
            _fetch_missing(repo_id, revision, no_progress, _REST)
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_REST, local_files_only=True))


def _fetch_missing(repo_id: str, revision: str | None, progress: Progress, patterns: list[str]) -> None:
    files = snapshot_download(repo_id, revision=revision, allow_patterns=patterns, dry_run=True)
    sizes = {file.filename: file.file_size or 0 for file in files if file.will_download}
    total = sum(sizes.values())
    check_room(Path(constants.HF_HUB_CACHE), total, what=f"the files of {repo_id}")
    done = 0
    for file in files:
        progress(done, total)
        hf_hub_download(repo_id, file.filename, revision=file.commit_hash)
        done += sizes.get(file.filename, 0)
    progress(total, total)


def _is_reachable() -> bool:
    """One request without huggingface_hub's five retries, which take half a minute to say that there is no network."""
    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HTTPError, OSError):
        return False
    return True


def _has_weights(snapshot: Path) -> bool:
    """Whether all weights of a cached snapshot are there; a download may have stopped half-way."""
    try:
        return bool(weight_files(snapshot))
    except ModelFileError:
        return False


def _remote_tensors(repo_id: str, revision: str) -> tuple[TensorSpec, ...]:
    try:
        index = Path(hf_hub_download(repo_id, INDEX, revision=revision))
    except RemoteEntryNotFoundError:
        return _single_file(repo_id, revision)
    weight_map = parse_weight_map(read_json_object(index), f"{repo_id}/{INDEX}")
    names = shard_names(weight_map, f"{repo_id}/{INDEX}")
    with ThreadPoolExecutor(max_workers=8) as pool:
        headers = list(pool.map(lambda name: _fetch_header(repo_id, revision, name), names))
    found = [(entry.spec, name) for name, header in zip(names, headers, strict=True) for entry in header.tensors]
    check_index(weight_map, [(spec.name, shard) for spec, shard in found], where=f"{repo_id}/{INDEX}")
    return tuple(spec for spec, _ in found)


def _single_file(repo_id: str, revision: str) -> tuple[TensorSpec, ...]:
    try:
        header = _fetch_header(repo_id, revision, SINGLE)
    except RemoteEntryNotFoundError:
        return ()
    return tuple(entry.spec for entry in header.tensors)


def _fetch_header(repo_id: str, revision: str, name: str) -> SafetensorsHeader:
    where = f"{repo_id}/{name}"
    url = hf_hub_url(repo_id, name, revision=revision)
    front, total_bytes = _fetch_range(url, 0, _FIRST_BYTES, where=where)
    length = header_length(front[:LENGTH_BYTES], total_bytes=total_bytes, where=where)
    text = front[LENGTH_BYTES : LENGTH_BYTES + length]
    if len(text) < length:
        rest, _ = _fetch_range(url, len(front), LENGTH_BYTES + length, where=where)
        text += rest
    if len(text) < length:
        raise refusal(where, LENGTH_BYTES + len(text), "the server sent less of the header than it announced")
    return parse_header(text, total_bytes=total_bytes, where=where)


def _fetch_range(url: str, begin: int, end: int, *, where: str) -> tuple[bytes, int]:
    """Bytes [begin, end) of a remote file, fewer where it ends earlier, and the file's size."""
    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    # The session keeps the token from hosts it is redirected to.
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code != 206 or not total.isdecimal():
            raise ModelFileError(f"{where}: the server does not send parts of files; download the model instead")
        received = bytearray()
        for chunk in response.iter_bytes():
            received += chunk
            if len(received) >= end - begin:
                break
    return bytes(received[: end - begin]), int(total)


@contextmanager
def _without_bars() -> Iterator[None]:
    """huggingface_hub's own bars off: who called shows progress, or wants none for a few kilobytes."""
    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Failures of the Hub as errors that say what to do."""
    where = f"{repo_id}@{revision}" if revision else repo_id
    nearest = did_you_mean(repo_id, (name for name in catalogue.names() if name != repo_id))
    try:
        yield
    except GatedRepoError:
        page = f"{constants.ENDPOINT}/{repo_id}"
        raise UnknownNameError(f"{repo_id} is gated: accept its licence at {page}, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise UnknownNameError(
            f"the Hub has no model {repo_id!r}, or it is private (set HF_TOKEN to see private ones){nearest}"
        ) from None
    except (RevisionNotFoundError, RevisionResolutionError):
        raise UnknownNameError(f"{repo_id} has no revision {revision!r}; name a branch, a tag or a commit") from None
    except HFValidationError:
        raise UnknownNameError(f"{repo_id!r} is no Hub id; write owner/name{nearest}") from None
    except LocalEntryNotFoundError:
        raise UnknownNameError(_out_of_reach(where) + nearest) from None
    except EntryNotFoundError:
        raise UnknownNameError(f"{where} on the Hub has no config.json, so it is not a transformers model") from None
    except (HTTPError, OSError) as error:
        raise UnknownNameError(f"{_out_of_reach(where)} ({type(error).__name__}: {error}){nearest}") from None


def _out_of_reach(where: str) -> str:
    if constants.is_offline_mode():
        return (
            f"{where} is not in the Hub's cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids asking the Hub"
        )
    return f"{where} is not in the Hub's cache, and the Hub at {constants.ENDPOINT} cannot be reached"
