"""A model's modules: with random weights on any device (fake ones too), or with the weights of a directory.

Both ways give the same names, shapes, dtypes and ties (a test compares them), so a rehearsal on the first kind
speaks for a run on the second.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from brim.errors import ModelFileError, UsageError
from brim.models.spec import ModelSpec, Task

_CLASSES: dict[Task, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "masked-lm": AutoModelForMaskedLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def skeleton(
    spec: ModelSpec, *, dtype: str, attention: str, task: Task | None = None, num_labels: int | None = None
) -> PreTrainedModel:
    """The model with random weights on the current device; inside a fake mode, with fake ones.

    `task` decides the head (default: what the model was made for), `num_labels` the size of a classifier's.
    Raises UsageError for a family that transformers does not know, or knows no such head for.
    """
    config = _config_of(spec, num_labels)
    model = _class_of(spec, config, task or spec.task).from_config(
        config, dtype=DTYPES[dtype], attn_implementation=attention
    )
    if not spec.tied_head:
        _untie_head(model)
    return model


def attention_kernels(spec: ModelSpec, *, task: Task | None = None) -> tuple[str, ...]:
    """Values of `memory.attention` that transformers has for this model, the best first.

    Families whose attention is written out only (BLOOM, GPT-J, Gemma 2), or that have none, know `eager` alone.
    """
    config = _config_of(spec)
    model_class = _class_of(spec, config, task or spec.task)._model_mapping[type(config)]
    return ("sdpa", "eager") if model_class._supports_sdpa else ("eager",)


def _config_of(spec: ModelSpec, num_labels: int | None = None) -> PretrainedConfig:
    facts = dict(spec.config)
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
) -> PreTrainedModel:
    """The model with the weights of this directory, each tensor in storage of its own on the CPU.

    A head that the directory lacks (a new classifier's) gets random weights.

    transformers may leave tensors in the mapped file; copying each (one at a time) makes them memory that the
    allocator knows and that training may write to.
    """
    auto, labels = _CLASSES[task or spec.task], {} if num_labels is None else {"num_labels": num_labels}
    try:
        model = auto.from_pretrained(
            directory,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            **labels,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"{directory}: transformers cannot load it: {error}") from error
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return model


def _untie_head(model: PreTrainedModel) -> None:
    """Give a head that the config ties a weight of its own: some checkpoints (FLAN-T5) hold one all the same.

    Untying by the config would untie the encoder's and decoder's embeddings from each other, too.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(torch.empty_like(embedding.weight).normal_(std=0.02))
