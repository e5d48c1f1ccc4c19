"""A model's modules: with random weights on any device (fake ones too), or with the weights of a directory.

Both ways give the same names, shapes, dtypes and ties (a test compares them), so a rehearsal on the first kind
speaks for a run on the second.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from brim.errors import ModelFileError, UsageError
from brim.models.spec import ModelSpec, Task

_CLASSES: dict[Task, Any] = {"causal-lm": AutoModelForCausalLM, "seq2seq-lm": AutoModelForSeq2SeqLM}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def skeleton(spec: ModelSpec, *, dtype: str, attention: str) -> PreTrainedModel:
    """The model with random weights on the current device; inside a fake mode, with fake ones.

    Raises UsageError for a family that transformers does not know.
    """
    facts = dict(spec.config)
    try:
        config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    except ValueError:
        raise UsageError(f"model {spec.name}: transformers has no family {spec.model_type!r}") from None
    model = _CLASSES[spec.task].from_config(config, dtype=DTYPES[dtype], attn_implementation=attention)
    if not spec.tied_head:
        _untie_head(model)
    return model


def load(spec: ModelSpec, directory: Path, *, dtype: str, attention: str) -> PreTrainedModel:
    """The model with the weights of this directory, each tensor in storage of its own on the CPU.

    transformers may leave tensors in the mapped file; copying each (one at a time) makes them memory that the
    allocator knows and that training may write to.
    """
    try:
        model = _CLASSES[spec.task].from_pretrained(
            directory, dtype=DTYPES[dtype], attn_implementation=attention, local_files_only=True, use_safetensors=True
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
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(torch.empty_like(embedding.weight).normal_(std=0.02))
