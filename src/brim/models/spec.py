"""`ModelSpec`: what a model is, from its config and file headers alone. No weights, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from brim.errors import ModelFileError
from brim.models.families import AFTER_PADDING, EAGER_ONLY, ENCODERS, FULL_LOSS_ONLY

Task = Literal["causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a file, as its header declares it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As Brim names formats: `fp32`, `bf16`, `int8`, `q4_1`; in lower case."""
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What `describe` found out about a model."""

    name: str
    """What the user called it."""
    kind: Literal["catalogue", "directory", "hub", "gguf"]
    config: Mapping[str, Any]
    """Facts in the form of a Hugging Face `config.json`."""
    num_parameters: int
    """Distinct parameters: a tied head counts once."""
    tensors: tuple[TensorSpec, ...] = ()
    """From file headers; empty when only the config is known."""
    path: Path | None = None
    """Directory of a Hugging Face model, or the GGUF file, on this machine; None where nothing is local."""
    hub_id: str | None = None
    revision: str | None = None
    tied_head: bool
    """The output head shares the input embedding's weights. The file's header decides; without one, the config."""
    stored_bytes: int = field(default=0)
    """Bytes of all tensors as stored in the files; 0 when only the config is known."""

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def task(self) -> Task:
        """What the model was made for: by the class that saved it, else by its family."""
        architecture = str((self.config.get("architectures") or [""])[0])
        if self.is_encoder_decoder:
            return "seq2seq-lm"
        if architecture.endswith("ForSequenceClassification"):
            return "sequence-classification"
        if architecture.endswith("ForMaskedLM") or self.model_type in ENCODERS:
            return "masked-lm"
        return "causal-lm"

    @property
    def attention(self) -> Literal["eager", "sdpa"]:
        """The best value of `memory.attention` that transformers has for this family."""
        return "eager" if self.model_type in EAGER_ONLY else "sdpa"

    @property
    def loss(self) -> Literal["full", "chunked"]:
        """The best value of `memory.loss` that this model can have: chunked, where it has logits of each token."""
        plain = self.task == "sequence-classification" or self.model_type in FULL_LOSS_ONLY
        return "full" if plain else "chunked"

    @property
    def num_labels(self) -> int:
        """Classes that a classifier's config names; two where it names none, as transformers assumes."""
        names = self.config.get("id2label") if self.task == "sequence-classification" else None
        return len(names or (0, 1))

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.config.get("is_encoder_decoder"))

    def first(self, *keys: str, default: int | None = None) -> int:
        """The first of these config keys that is present: families name the same fact differently.

        Raises ModelFileError when none is, or when it is no size.
        """
        for key in keys:
            if (value := self.config.get(key)) is not None:
                if type(value) is not int or value <= 0:
                    raise ModelFileError(f"{self.name}: config {key} = {value!r} is not a size; mend its config.json")
                return value
        if default is None:
            raise ModelFileError(f"{self.name}: config has none of {', '.join(keys)}; it is incomplete")
        return default

    @property
    def hidden_size(self) -> int:
        return self.first("hidden_size", "d_model", "n_embd", "dim")

    @property
    def num_layers(self) -> int:
        """Blocks; encoder and decoder counted together."""
        layers = self.first("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers")
        if self.is_encoder_decoder:
            return self.first("encoder_layers", default=layers) + self.first(
                "num_decoder_layers", "decoder_layers", default=layers
            )
        return layers

    @property
    def num_heads(self) -> int:
        return self.first("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", default=1)

    @property
    def num_kv_heads(self) -> int:
        return self.first("num_key_value_heads", default=self.num_heads)

    @property
    def head_dim(self) -> int:
        return self.first("head_dim", "d_kv", default=self.hidden_size // self.num_heads)

    @property
    def intermediate_size(self) -> int:
        return self.first(
            "intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", default=4 * self.hidden_size
        )

    @property
    def num_positions(self) -> int | None:
        """Tokens of the longest row that the model was made for, if its config says."""
        rows = self.first("max_position_embeddings", "n_positions", default=0)
        if rows and self.model_type in AFTER_PADDING:
            padding = self.config.get("pad_token_id")
            return rows - 1 - (1 if padding is None else int(padding))
        return rows or None

    @property
    def vocab_size(self) -> int:
        return self.first("vocab_size")
