"""`describe(source) -> ModelSpec`: the only place that sniffs what a source is."""

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from brim.errors import ModelFileError, UnknownNameError, did_you_mean
from brim.models import catalogue, embedded
from brim.models.catalogue import CatalogueEntry
from brim.models.config import count_parameters, head_and_embedding, is_packed, read_config
from brim.models.count import count_from_config, tied_by_config
from brim.models.directory import StoredTensor, checked_file, same_bytes, stored_tensors
from brim.models.gguf_config import config_from_gguf
from brim.models.gguf_header import read_gguf_header
from brim.models.spec import ModelSpec, TensorSpec

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_CATALOGUE_REVISION = re.compile(r"(?P<name>[^@]+)@(?P<revision>[\w./-]+)")


def describe(source: str) -> ModelSpec:
    """What this model is, from config and file headers alone.

    `source` is a catalogue name, a local Hugging Face directory, a .gguf file, or a Hub id with optional `@revision`.
    A catalogue name wins over a directory of the same name: write `./name` for that one. A Hub id that the catalogue
    knows is answered from there; with a revision it is asked for on the Hub.
    Raises UnknownNameError for what nobody knows, ModelFileError for a damaged file.
    """
    if entry := catalogue.find(source):
        return _from_catalogue(source, entry)
    path = Path(source).expanduser()
    if source and _exists(path):
        return describe_directory(source, path) if path.is_dir() else _from_file(source, path)
    if _looks_like_path(source):
        raise UnknownNameError(f"{source} does not exist; name a model directory, a .gguf file, or a model")
    if match := _HUB_ID.fullmatch(source):
        return _from_hub(source, match["id"], match["revision"])
    if (match := _CATALOGUE_REVISION.fullmatch(source)) and (entry := catalogue.find(match["name"])) and entry.hub_id:
        return _from_hub(source, entry.hub_id, match["revision"])
    meant = did_you_mean(source, catalogue.names()) or "; name one of the catalogue, as smollm2-135m, or a Hub id"
    raise UnknownNameError(f"unknown model {source!r}{meant}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return False


def _looks_like_path(source: str) -> bool:
    if source.startswith(("/", "./", "../", "~")) or source.endswith((".gguf", ".safetensors", "/")):
        return True
    return source.count("/") > 1 and "@" not in source


def _from_catalogue(name: str, entry: CatalogueEntry) -> ModelSpec:
    spec = ModelSpec(
        name=name,
        kind="catalogue",
        config=entry.config,
        num_parameters=entry.num_parameters,
        hub_id=entry.hub_id,
        tied_head=entry.tied_head,
    )
    model = embedded.embedded_model(name)
    if model is None:
        return spec
    file = embedded.whole_file(model)
    tensors = tuple(tensor.spec for tensor in read_gguf_header(file).tensors) if file else ()
    return replace(spec, hub_id=model.hub_id, path=file, tensors=tensors, stored_bytes=_stored_bytes(tensors))


def describe_directory(name: str, directory: Path, tensors: Iterable[StoredTensor] | None = None) -> ModelSpec:
    """What the model in this directory is; `tensors` where its weights are not safetensors. Raises ModelFileError."""
    if not _exists(directory / "config.json"):
        raise ModelFileError(f"{directory} has no config.json, so it is not a Hugging Face model directory")
    config = read_config(checked_file(directory, "config.json"))
    stored = {tensor.spec.name: tensor for tensor in (stored_tensors(directory) if tensors is None else tensors)}
    head, embedding = head_and_embedding(stored)
    is_copy = head is not None and embedding is not None and same_bytes(stored[head], stored[embedding])
    specs = tuple(tensor.spec for tensor in stored.values())
    tied = _is_tied(config, specs, head_is_copy=is_copy)
    spec = ModelSpec(name=name, kind="directory", config=config, num_parameters=0, path=directory, tied_head=tied)
    return _counted(spec, specs)


def _from_file(name: str, path: Path) -> ModelSpec:
    if path.suffix.lower() != ".gguf":
        raise ModelFileError(f"{path} is not a .gguf file; name the directory of a Hugging Face model instead")
    header = read_gguf_header(path)
    tensors = tuple(tensor.spec for tensor in header.tensors)
    config = config_from_gguf(header, where=path)
    tied = bool(config["tie_word_embeddings"])
    return _counted(
        ModelSpec(name=name, kind="gguf", config=config, num_parameters=0, path=path, tied_head=tied), tensors
    )


def _from_hub(name: str, repo_id: str, revision: str | None) -> ModelSpec:
    # Imported here, by name: huggingface_hub's HTTP client takes 0.2 s, and `brim --help` shall answer in 0.3 s.
    found = importlib.import_module("brim.models.hub").describe_on_hub(repo_id, revision)
    by_name = {tensor.name: tensor for tensor in found.tensors}
    head, embedding = head_and_embedding(by_name)
    # The bytes are far away. Files that store a tied head twice say so in their config, so the config is believed.
    is_copy = head is not None and embedding is not None and by_name[head].shape == by_name[embedding].shape
    tied = _is_tied(found.config, found.tensors, head_is_copy=is_copy)
    spec = ModelSpec(
        name=name,
        kind="hub",
        config=found.config,
        num_parameters=0,
        path=found.directory,
        hub_id=repo_id,
        revision=revision,
        tied_head=tied,
    )
    return _counted(spec, found.tensors)


def _is_tied(config: Mapping[str, Any], tensors: Iterable[TensorSpec], *, head_is_copy: bool) -> bool:
    """The files decide: no head in them, or a copy of an embedding that the config calls tied.

    Without files, the config. What its class assumes does not count against a file: FLAN-T5's knows of no head.
    """
    names = [tensor.name for tensor in tensors]
    if not names:
        return tied_by_config(config)
    head, _ = head_and_embedding(names)
    return head is None or (head_is_copy and config.get("tie_word_embeddings") is True)


def _counted(spec: ModelSpec, tensors: tuple[TensorSpec, ...]) -> ModelSpec:
    """With its tensors and parameters: counted in the headers; where these are absent or packed, from the config."""
    if tensors and not is_packed(tensors):
        count = count_parameters(tensors, tied_head=spec.tied_head)
    else:
        count = count_from_config(spec)
    return replace(spec, num_parameters=count, tensors=tensors, stored_bytes=_stored_bytes(tensors))


def _stored_bytes(tensors: Iterable[TensorSpec]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
