"""A model's modules: with random weights on any device (fake ones too), or with the weights of a directory.

Both ways give the same names, shapes, dtypes and ties (a test compares them), so a rehearsal on the first kind
speaks for a run on the second.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from brim.errors import ModelFileError, UsageError
from brim.models.spec import ModelSpec, Task

_CLASSES: dict[Task, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "masked-lm": AutoModelForMaskedLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Swap(Protocol):
    """Other modules in the place of some, from the start: those replaced never have memory of their own."""

    def swap(self, model: PreTrainedModel) -> None:
        """Replace modules of a model that is on the meta device."""

    def fill(self, model: PreTrainedModel) -> None:
        """Give the new modules random weights on the current device."""

    def loading(self) -> QuantizationConfigMixin:
        """What makes transformers' loader swap, and hand each weight of theirs to the new modules as it reads it."""


def skeleton(
    spec: ModelSpec,
    *,
    dtype: str,
    attention: str,
    task: Task | None = None,
    num_labels: int | None = None,
    swap: Swap | None = None,
    written: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """The model with random weights on the current device; inside a fake mode, with fake ones.

    `task` decides the head (default: what the model was made for), `num_labels` the size of a classifier's; `written`
    is another library's class for the same config.
    Raises UsageError for a family that transformers does not know, or knows no such head for.
    """
    config = _config_of(spec, num_labels)
    settings = {"dtype": DTYPES[dtype], "attn_implementation": attention}
    from_config = _class_of(spec, config, task or spec.task).from_config if written is None else written._from_config
    if swap is None:
        model: PreTrainedModel = from_config(config, **settings)
        if not spec.tied_head:
            _untie_head(model)
    else:
        with unset_fake_temporarily(), _disable_current_modes(), torch.device("meta"):
            model = from_config(config, **settings)
            swap.swap(model)
            if not spec.tied_head:
                _untie_head(model)
        _materialize(model)
        swap.fill(model)
        model.initialize_weights()
    return model


def attention_kernels(spec: ModelSpec, *, task: Task | None = None) -> tuple[str, ...]:
    """Values of `memory.attention` that transformers has for this model, the best first.

    Families whose attention is written out only (BLOOM, GPT-J, Gemma 2), or that have none, know `eager` alone.
    """
    config = _config_of(spec)
    model_class = _class_of(spec, config, task or spec.task)._model_mapping[type(config)]
    return ("sdpa", "eager") if model_class._supports_sdpa else ("eager",)


def _config_of(spec: ModelSpec, num_labels: int | None = None) -> PretrainedConfig:
    facts = deepcopy(dict(spec.config))  # transformers writes into what is nested (rope_scaling)
    if num_labels is not None:
        facts = {key: value for key, value in facts.items() if key not in ("id2label", "label2id")}
        facts["num_labels"] = num_labels
    try:
        return AutoConfig.for_model(facts.pop("model_type"), **facts)
    except ValueError:
        raise UsageError(f"model {spec.name}: transformers has no family {spec.model_type!r}") from None


def _class_of(spec: ModelSpec, config: PretrainedConfig, task: Task) -> Any:
    """The auto class of a task. Raises UsageError where it has no model of this family."""
    if type(config) not in _CLASSES[task]._model_mapping:
        raise UsageError(
            f"model {spec.name}: transformers has no {task} head for the family {spec.model_type!r}; "
            f"nearest: task = {spec.task}"
        )
    return _CLASSES[task]


def load(
    spec: ModelSpec,
    directory: Path,
    *,
    dtype: str,
    attention: str,
    task: Task | None = None,
    num_labels: int | None = None,
    swap: Swap | None = None,
    mapped: bool = False,
) -> PreTrainedModel:
    """The model with the weights of this directory on the CPU, each tensor in storage of its own.

    A head that the directory lacks (a new classifier's) gets random weights.

    transformers may leave tensors in the mapped file; copying each (one at a time) makes them memory that the
    allocator knows and that training may write to. `mapped`: they stay there, for who takes parts of them; what is
    stored in another format than `dtype` is copied all the same.
    """
    auto = _CLASSES[task or spec.task]
    settings: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    try:
        if swap is not None:
            # What the files say of their own format is the swap's to know: transformers would read them by it.
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **settings)
            vars(config).pop("quantization_config", None)
            settings = {"config": config, "quantization_config": swap.loading()}
        model = auto.from_pretrained(
            directory,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            **settings,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"{directory}: transformers cannot load it: {error}") from error
    for tensor in [*(() if mapped else model.parameters()), *model.buffers()]:
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            # A view, as what a file holds packed comes in: its base would live as long as itself.
            if buffer is not None and buffer._base is not None:
                module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)
    if swap is not None:
        model.hf_quantizer.remove_quantization_config(model)
    return model


def _materialize(model: PreTrainedModel) -> None:
    """Memory on the current device for what is on meta, ties kept; it counts as not initialized."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old tensor too: its identity is not to be given out again

    def there(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = tensor, nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return made[id(tensor)][1]

    for module in model.modules():
        module._is_hf_initialized = False  # transformers' own mark
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = there(tensor)


def _untie_head(model: PreTrainedModel) -> None:
    """Give a head that the config ties a weight of its own: some checkpoints (FLAN-T5) hold one all the same.

    Untying by the config would untie the encoder's and decoder's embeddings from each other, too.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(torch.empty_like(embedding.weight).normal_(std=0.02))
