"""A model and its tokenizer from a local directory, ready to run: no network, no code from the model's files."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from brim import units
from brim.checkpoints.gguf_packed import packed_directory
from brim.checkpoints.patterns import matcher
from brim.errors import MissingPartError, ModelFileError, UsageError
from brim.inference.packed import packer_of, rearrange
from brim.models import describe
from brim.models.families import ENCODERS
from brim.models.quiet import quiet_transformers
from brim.models.weights import local_directory


class Loaded(NamedTuple):
    """A model in evaluation mode and the tokenizer that feeds it."""

    model: Any
    tokenizer: Any

    @property
    def is_seq2seq(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model was made for; None where its config sets no limit (T5's relative positions)."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def locate(source: str, *, progress: units.Progress = units.no_progress) -> Path:
    """The directory that holds the model's weights on this machine; they are fetched or prepared where they are not.

    An adapter's directory stands for itself. A GGUF file whose matrices are Q8_0 or Q4_0 stays so.
    """
    if _is_adapter(Path(source)):
        return Path(source)
    spec = describe(source)
    return packed_directory(spec, progress=progress) or local_directory(spec, progress=progress)


def load(
    directory: Path, *, device: str | None = None, pack: str | None = None, compute: torch.dtype | None = None
) -> Loaded:
    """The model in the precision it is stored in, on `device` (None: the first GPU, or the CPU where there is none).

    Weights that are stored packed stay packed; what layouts of others hold in a form that no module here takes, they
    unpack (INT8 then needs compressed-tensors). `pack`: the rest is packed in this format as it is read
    (`inference.packed.FORMATS`). `compute`: what models that are packed run in; None: what they were made for.
    A directory that holds an adapter loads its base model with the adapter on it.
    Raises ModelFileError, MissingPartError, UsageError.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _quiet(), _transformers_errors(directory):
        if _is_adapter(directory):
            base = _load_model(_adapter_base(directory), pack=pack, compute=compute)
            model = PeftModel.from_pretrained(base, str(directory))
        else:
            model = _load_model(directory, pack=pack, compute=compute)
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    model = model.eval().to(device)
    rearrange(model)
    return Loaded(model, tokenizer)


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of the storages behind all parameters and buffers; one that several names share counts once."""
    storages = (tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _load_model(directory: Path, *, pack: str | None, compute: torch.dtype | None) -> Any:
    config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    if config.model_type in ENCODERS:
        raise UsageError(f"{directory} is a {config.model_type}, which fills in masked tokens: it writes no text and "
                         "has no perplexity; name a causal model")  # fmt: skip
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    packer = packer_of(describe(str(directory.resolve())), pack=pack, compute=compute)
    settings: dict[str, Any] = {"dtype": "auto"}
    if packer is not None:
        settings = {"dtype": packer.compute, "quantization_config": packer.loading()}
        # Otherwise transformers would have its quantizer of this name read the file.
        vars(config).pop("quantization_config", None)
    else:
        _check_expressions(getattr(config, "quantization_config", None), directory)
    model, loading = kind.from_pretrained(
        str(directory),
        config=config,
        **settings,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    # transformers fills what a file lacks with random numbers and carries on.
    if missing := sorted([*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]):
        raise ModelFileError(
            f"{directory}: {len(missing)} tensors that the model needs are missing or misshapen, first {missing[0]}"
        )
    if packer is not None:
        model.hf_quantizer.remove_quantization_config(model)
    return model


def _check_expressions(told: Any, directory: Path) -> None:
    """Raises ModelFileError for expressions in a quantization config that may take unbounded time: transformers and
    the library it calls match them with the names of all modules."""
    match told:
        case str() if told.startswith("re:"):
            try:
                matcher(told)
            except UsageError as error:
                raise ModelFileError(f"{directory}: quantization_config: {error}") from None
        case dict():
            _check_expressions([*told, *told.values()], directory)
        case list():
            for inner in told:
                _check_expressions(inner, directory)


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file() and not (directory / "config.json").exists()


def _adapter_base(directory: Path) -> Path:
    path = directory / "adapter_config.json"
    try:
        return locate(str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]))
    except (ValueError, KeyError, TypeError):
        raise ModelFileError(f"{path}: names no base model (base_model_name_or_path)") from None


@contextmanager
def _transformers_errors(directory: Path) -> Iterator[None]:
    """What transformers says about files, as our errors with the directory's name."""
    try:
        yield
    except ImportError as error:
        if "compressed" not in str(error):
            raise
        raise MissingPartError(f"{directory} is quantized; reading it needs: pip install 'brim[int8]'") from None
    except SafetensorError as error:
        raise ModelFileError(f"{directory}: damaged safetensors file: {error}") from None
    except (ModelFileError, UsageError):
        raise
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().partition(os.linesep)[0]
        raise ModelFileError(f"{directory}: transformers cannot load it: {first_line}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither transformers nor PEFT says anything."""
    with quiet_transformers(), warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by an old name; delete this when a newer PEFT does not.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield
