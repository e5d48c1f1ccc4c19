"""LoRA through PEFT: small trainable matrices beside frozen weights."""

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from brim.errors import RecipeError, did_you_mean
from brim.layers.packed_experts import DOWN, GATE_UP, PackedExperts
from brim.models import ModelSpec
from brim.models.skeleton import DTYPES
from brim.recipe import Recipe
from brim.training.head import classifier_name

_TASKS = {
    "causal-lm": TaskType.CAUSAL_LM,
    "seq2seq-lm": TaskType.SEQ_2_SEQ_LM,
    "masked-lm": None,  # PEFT has no name for it and needs none
    "sequence-classification": TaskType.SEQ_CLS,
}
_MAMBA_FAMILIES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Their `out_proj` is read by a fused kernel that does not see an adapter, so PEFT refuses it."""


def add_lora(base: PreTrainedModel, recipe: Recipe) -> nn.Module:
    """`base` with adapters in the format of its weights (an FP32 copy of them is the optimizer's `master`).

    Or in FP32, where `library.adapters` says so. Packed experts have none: PEFT adapts them as parameters, which they
    are not; "all-linear" is then attention, the router and other linear layers.
    """
    targets = recipe.lora.targets
    _check_targets(base, targets)
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        use_rslora=recipe.lora.rslora,
        use_dora=recipe.lora.dora,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        exclude_modules=["out_proj"] if base.config.model_type in _MAMBA_FAMILIES else None,
        modules_to_save=[classifier_name(base)] if recipe.task == "sequence-classification" else None,
        task_type=_TASKS[recipe.task],
        # GPT-2 keeps its linear layers transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
    )
    with warnings.catch_warnings():
        # PEFT gives the fused matrices of experts their own rank, applies it, and then misses modules of that name.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        # transformers 5.23 renames its checkpointing methods; PEFT 0.21 still calls the old ones.
        warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing", FutureWarning)
        model: nn.Module = get_peft_model(base, config, autocast_adapter_dtype=recipe.library.adapters == "fp32")
    if any(isinstance(module, PackedExperts) for module in base.modules()):
        _forget_experts(config)
    if recipe.precision.packed and recipe.library.adapters != "fp32":
        _cast_adapters(model, DTYPES[recipe.plain_format])
    return model


def _forget_experts(config: LoraConfig) -> None:
    """PEFT lists experts' parameters as adapted, and finds none where they are packed: who loads the adapter beside
    plain experts would look for theirs."""
    parameters = (GATE_UP, DOWN)
    config.target_parameters = [name for name in config.target_parameters or () if name not in parameters] or None
    for pattern in (config.rank_pattern, config.alpha_pattern):
        for name in [name for name in pattern if name.endswith(parameters)]:
            del pattern[name]


def _cast_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """PEFT gives adapters their layer's format; beside codes it leaves them in FP32."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A.to(dtype)
            module.lora_B.to(dtype)


def save_adapter(model: PeftModel, spec: ModelSpec, directory: Path, *, state: dict[str, Tensor] | None = None) -> None:
    """PEFT's file form; a base from the Hub is named by its id there, any other by its directory.

    `state`: the model's tensors, where its own are parts.
    """
    if spec.hub_id and spec.kind == "hub":
        config = model.peft_config[model.active_adapter]
        config.base_model_name_or_path, config.revision = spec.hub_id, spec.revision
    # Embeddings never are among the targets; left to itself PEFT asks the Hub whether they have changed.
    model.save_pretrained(directory, save_embedding_layers=False, state_dict=state)


def _check_targets(base: PreTrainedModel, targets: tuple[str, ...]) -> None:
    if targets == ("all-linear",):
        return
    head = base.get_output_embeddings()
    layers = [
        name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    known = {name.rsplit(".", 1)[-1] for name in layers}
    for target in targets:
        # PEFT's own rule for a list of names.
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise RecipeError(
                f"lora.targets: the model has no linear layer {target!r} below its head{did_you_mean(target, known)}; "
                f'known: {", ".join(sorted(known))}, or "all-linear" alone'
            )
