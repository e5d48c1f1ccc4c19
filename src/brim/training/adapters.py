"""LoRA through PEFT: small trainable matrices beside frozen weights."""

import warnings

from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from brim.errors import RecipeError, did_you_mean
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
    """`base` with adapters in the format of its weights (an FP32 copy of them is the optimizer's `master`)."""
    targets = recipe.lora.targets
    _check_targets(base, targets)
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        exclude_modules=["out_proj"] if base.config.model_type in _MAMBA_FAMILIES else None,
        modules_to_save=[classifier_name(base)] if recipe.task == "sequence-classification" else None,
        task_type=_TASKS[recipe.task],
    )
    with warnings.catch_warnings():
        # PEFT gives the fused matrices of experts their own rank, applies it, and then misses modules of that name.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        # transformers 5.23 renames its checkpointing methods; PEFT 0.21 still calls the old ones.
        warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing", FutureWarning)
        model: nn.Module = get_peft_model(base, config, autocast_adapter_dtype=False)
    return model


def _check_targets(base: PreTrainedModel, targets: tuple[str, ...]) -> None:
    if targets == ("all-linear",):
        return
    known = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        if target.rsplit(".", 1)[-1] not in known:
            raise RecipeError(
                f"lora.targets: the model has no linear layer {target!r}{did_you_mean(target, known)}; "
                f'known: {", ".join(sorted(known))}, or "all-linear" alone'
            )
