"""`local_directory(spec)`: the weights of a model as a Hugging Face directory on this machine.

A directory is used as it is, a Hub id is downloaded into the Hub's cache. A GGUF file (also the one in a pip package)
is prepared once into Brim's cache (`$XDG_CACHE_HOME/brim`, else `~/.cache/brim`) as FP32 safetensors with its
tokenizer: what transformers makes of it. If the GGUF is quantized, as the embedded SmolLM2-135M is (Q4_1), that FP32
model is the dequantization of 4-bit weights. It is the full-precision baseline of every later comparison here; it is
not the model that the publisher trained.

Needs torch and transformers, so `brim.models` does not import it.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from transformers import modeling_gguf_pytorch_utils as gguf_loader

from brim.cache import cache_directory
from brim.errors import MissingPartError, ModelFileError, UnknownNameError, UsageError
from brim.models import embedded, hub
from brim.models.directory import read_tensors, weight_files
from brim.models.embedded import EmbeddedModel
from brim.models.gguf_config import config_from_gguf
from brim.models.gguf_header import GgufHeader, read_gguf_header
from brim.models.quiet import quiet_transformers
from brim.models.spec import ModelSpec
from brim.publish import check_room, whole_directory
from brim.units import Progress, no_progress

_CACHE_FORMAT = 1
"""Raised when prepared directories change, so that old ones are not taken for new."""
_TOKENIZER_BYTES = 64 * 2**20


def local_directory(spec: ModelSpec, *, progress: Progress = no_progress) -> Path:
    """The directory with this model's config.json, safetensors and tokenizer; prepared or downloaded when needed.

    Progress is in tensors when preparing, in bytes when downloading. Raises ModelFileError for damaged files,
    DoesNotFitError when the disk lacks the room, UnknownNameError and MissingPartError for what cannot be had,
    UsageError for a model without weights.
    """
    if model := embedded.embedded_model(spec.name) if spec.kind == "catalogue" else None:
        return _embedded(model, spec, progress)
    if spec.path and spec.path.is_dir():
        if not weight_files(spec.path):
            raise UsageError(f"{spec.path} has a config.json but no weights; copy its safetensors files beside it")
        return spec.path
    if spec.path:
        gguf = spec.path
        return _prepared((gguf,), gguf.name, spec, progress, lambda _: gguf)
    if spec.hub_id:
        return hub.download(spec.hub_id, spec.revision, progress=progress)
    raise UsageError(f"{spec.name} is a shape for reckoning without weights; choose a model that has some")


def tokenizer_directory(spec: ModelSpec, *, progress: Progress = no_progress) -> Path:
    """A directory with this model's tokenizer; of a Hub id no weights are downloaded. Raises as `local_directory`."""
    if spec.hub_id and spec.path is None:
        return hub.download_tokenizer(spec.hub_id, spec.revision)
    return spec.path if spec.path and spec.path.is_dir() else local_directory(spec, progress=progress)


def _embedded(model: EmbeddedModel, spec: ModelSpec, progress: Progress) -> Path:
    parts = embedded.locate(model)

    def whole(directory: Path) -> Path:
        if len(parts) == 1:
            return parts[0]
        directory.mkdir()
        embedded.assemble(model, parts, directory / model.name)
        return directory / model.name

    if parts:
        return _prepared(parts, model.name, spec, progress, whole)
    try:
        return hub.download(model.hub_id, None, progress=progress)
    except UnknownNameError as error:
        raise MissingPartError(
            f"{spec.name}: its weights come with a package that is not installed (run: {model.install}) or from the "
            f"Hub, and {error}"
        ) from None


def _prepared(
    sources: tuple[Path, ...], name: str, spec: ModelSpec, progress: Progress, whole: Callable[[Path], Path]
) -> Path:
    """The prepared directory of a GGUF file of this name; `whole(place)` gives the file, made at `place` if need be."""
    source_bytes = sum(path.stat().st_size for path in sources) if len(sources) > 1 else 0

    def make(directory: Path) -> None:
        place = directory / "gguf"
        _convert(whole(place), directory, spec, progress)
        shutil.rmtree(place, ignore_errors=True)

    return prepared(sources, name, need_bytes=4 * spec.num_parameters + source_bytes, make=make)


def prepared(
    sources: tuple[Path, ...], name: str, *, form: str = "", need_bytes: int, make: Callable[[Path], None]
) -> Path:
    """The directory in the cache that `make` fills once from these files of a model, its tokenizer beside the weights;
    `form` tells it from others that are made of the same."""
    target = cache_directory() / "models" / f"{Path(name).stem.lower()}{form}-{_identity(sources)}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # One process prepares, the others wait and find it done.
    with FileLock(target.parent / f".{target.name}.waiting.lock"):
        if not target.is_dir():
            check_room(target.parent, need_bytes + _TOKENIZER_BYTES, what=f"preparing {name}")
            with whole_directory(target) as partial:
                make(partial)
    return target


def _identity(sources: Iterable[Path]) -> str:
    """A file with another name, size or time of change is another file; hashing gigabytes each time would be slow."""
    facts = [str(_CACHE_FORMAT)]
    for path in sources:
        status = path.stat()
        facts.append(f"{path.name}:{status.st_size}:{status.st_mtime_ns}")
    return hashlib.sha256("|".join(facts).encode()).hexdigest()[:16]


def _convert(gguf: Path, directory: Path, spec: ModelSpec, progress: Progress) -> None:
    """Write FP32 safetensors, config and tokenizer of this GGUF file into an empty directory."""
    # Our reader first: the loader's own checks little of what the file claims.
    header = read_gguf_header(gguf)
    facts = config_from_gguf(header, where=gguf)
    check_vocabulary(header, facts, gguf)
    config = transformers.AutoConfig.for_model(facts.pop("model_type"), **facts)
    total = len(header.tensors) + 2  # the tokenizer and the writing take a step each
    progress(0, total)
    with _quiet_loading(lambda done: progress(done, total)):
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, config=config, dtype=torch.float32, output_loading_info=True
        )
        if missing := loading["missing_keys"] | loading["mismatched_keys"]:
            raise ModelFileError(f"{gguf} lacks weights of its architecture: {', '.join(sorted(missing)[:4])}")
        # A model loaded from GGUF is marked as quantized, which save_pretrained refuses; its weights are dense by now.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        model.save_pretrained(directory)
        progress(total - 1, total)
        write_tokenizer(gguf, directory)
    written = sum(tensor.numel for tensor in read_tensors(directory))
    if written != spec.num_parameters:
        raise ModelFileError(f"{gguf} gave {written:,} parameters, and {spec.name} has {spec.num_parameters:,}")
    progress(total, total)


def check_vocabulary(header: GgufHeader, config: Mapping[str, Any], gguf: Path) -> None:
    """Raises ModelFileError where the file's tokenizer and its embedding do not go together."""
    if not 0 < header.array_lengths.get("tokenizer.ggml.tokens", 0) <= config["vocab_size"]:
        raise ModelFileError(f"{gguf} has no tokenizer that fits its embedding; use the model's Hugging Face form")


def write_tokenizer(gguf: Path, directory: Path) -> None:
    """Of this file, as transformers saves it."""
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


@contextmanager
def _quiet_loading(report: Callable[[int], None]) -> Iterator[None]:
    """transformers without its bars and warnings; its loop over the tensors of a GGUF reports how many are done."""
    bar = gguf_loader.tqdm

    def reported(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            report(done)
            yield tensor

    # The loader of GGUF files takes tqdm as it is, past transformers' own switch (transformers 5.23); delete this when
    # it asks `transformers.utils.logging.tqdm`, which has a hook.
    gguf_loader.tqdm = reported
    try:
        with quiet_transformers():
            yield
    finally:
        gguf_loader.tqdm = bar
