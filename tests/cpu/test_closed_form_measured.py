"""The closed form against the allocation peak that PyTorch's profiler reports for real training steps."""

from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch

from brim.layers.chunked_loss import chunk_tokens
from brim.memory.anatomy import anatomy
from brim.memory.closed_form import ERROR_BAND, closed_form, tokens_of_chunk
from brim.memory.rough import rough
from brim.models import ModelSpec
from brim.models.skeleton import skeleton
from brim.recipe import Lora, Memory, Optimizer, Precision, Qat, Recipe, Training
from brim.training.trial import measured_trial

_LLAMA = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000, "max_position_embeddings": 512,
}  # fmt: skip
_QWEN3 = {**_LLAMA, "model_type": "qwen3", "head_dim": 48, "tie_word_embeddings": False}
_QWEN2 = {**_LLAMA, "model_type": "qwen2"}
_GEMMA3 = {
    **_LLAMA, "model_type": "gemma3_text", "num_key_value_heads": 1, "head_dim": 64, "sliding_window": 64,
    "query_pre_attn_scalar": 64, "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
_GEMMA2 = {**_GEMMA3, "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_PHI3 = {**_LLAMA, "model_type": "phi3", "pad_token_id": 0, "tie_word_embeddings": False}
_OLMO2 = {**_LLAMA, "model_type": "olmo2", "pad_token_id": 0, "tie_word_embeddings": False}
_STABLELM = {**_LLAMA, "model_type": "stablelm", "tie_word_embeddings": False}
_PHI = {**_LLAMA, "model_type": "phi", "num_key_value_heads": 4, "hidden_act": "gelu_new", "tie_word_embeddings": False}
_GPTJ = {
    "model_type": "gptj", "n_embd": 128, "n_layer": 4, "n_head": 4, "rotary_dim": 16, "n_positions": 512,
    "vocab_size": 2000, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "tie_word_embeddings": False,
}  # fmt: skip
_BLOOM = {"model_type": "bloom", "hidden_size": 128, "n_layer": 4, "n_head": 4, "vocab_size": 2000}
_QWEN3_MOE = {
    **_LLAMA, "model_type": "qwen3_moe", "head_dim": 32, "moe_intermediate_size": 96, "num_experts": 8,
    "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
_FALCON = {
    "model_type": "falcon", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2000,
    "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True, "bias": False, "alibi": False,
}  # fmt: skip
_BART = {
    "model_type": "bart", "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 344, "decoder_ffn_dim": 344, "vocab_size": 2000,
    "max_position_embeddings": 512, "is_encoder_decoder": True, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
_BERT = {**_LLAMA, "model_type": "bert", "num_key_value_heads": 4, "hidden_act": "gelu"}
_MAMBA = {
    "model_type": "mamba", "hidden_size": 128, "intermediate_size": 256, "state_size": 16, "time_step_rank": 8,
    "num_hidden_layers": 4, "vocab_size": 1000, "tie_word_embeddings": True,
}  # fmt: skip
_GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 512, "vocab_size": 2000}
_NEOX = {
    "model_type": "gpt_neox", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "vocab_size": 2000, "max_position_embeddings": 512, "hidden_act": "gelu",
    "tie_word_embeddings": False,
}  # fmt: skip
_T5 = {
    "model_type": "t5", "d_model": 128, "d_ff": 344, "d_kv": 32, "num_heads": 4, "num_layers": 2,
    "num_decoder_layers": 2, "vocab_size": 2000, "feed_forward_proj": "relu", "is_encoder_decoder": True,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_FLAN_T5 = {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA, "qwen2": _QWEN2, "qwen3": _QWEN3, "gemma2": _GEMMA2, "gemma3": _GEMMA3, "phi3": _PHI3,
    "olmo2": _OLMO2, "stablelm": _STABLELM, "phi": _PHI, "gptj": _GPTJ, "bloom": _BLOOM,
    "qwen3_moe": _QWEN3_MOE, "falcon": _FALCON, "gpt2": _GPT2, "gpt_neox": _NEOX, "t5": _T5, "flan-t5": _FLAN_T5,
}  # fmt: skip
_RECIPES: dict[str, dict[str, Any]] = {
    "full fp32": {"precision": Precision(weights="fp32", compute="fp32")},
    "full mixed": {"precision": Precision(weights="fp32", compute="bf16")},
    "full master, checkpointed": {
        "precision": Precision(weights="bf16", compute="bf16", master="fp32"),
        "memory": Memory(activation_checkpointing="full"),
    },
    "full fp32, 8 bits": {
        "precision": Precision(weights="fp32", compute="fp32"),
        "optimizer": Optimizer(name="adamw8bit"),
    },
    "lora fp32, packed": {
        "method": "lora",
        "precision": Precision(weights="fp32", compute="fp32"),
        "training": Training(packing=True),
    },
    "full bf16, 8 bits, checkpointed": {
        "memory": Memory(activation_checkpointing="full"),
        "optimizer": Optimizer(name="adamw8bit"),
    },
    "lora bf16, dropout": {"method": "lora", "lora": Lora(dropout=0.05)},
    "lora bf16, chunked": {"method": "lora", "memory": Memory(loss="chunked")},
    "qat, checkpointed": {
        "method": "qat",
        "qat": Qat(granularity="group:8"),
        "precision": Precision(weights="fp32", compute="fp32"),
        "memory": Memory(activation_checkpointing="full"),
    },
    "qat scales, int8 by channel": {"method": "qat", "qat": Qat(format="int8", granularity="channel", train="scales")},
    "qat updates": {"method": "qat", "qat": Qat(granularity="group:8", train="adapters")},
    "qlora, chunked": {"method": "qlora", "precision": Precision(weights="nf4"), "memory": Memory(loss="chunked")},
    "qlora int8, checkpointed": {
        "method": "qlora",
        "precision": Precision(weights="int8"),
        "memory": Memory(activation_checkpointing="full"),
    },
    "lora fp32, checkpointed, accumulated": {
        "method": "lora",
        "precision": Precision(weights="fp32", compute="fp32"),
        "memory": Memory(activation_checkpointing="full"),
        "grad_accumulation": 2,
    },
}
_COUNTED_ELSEWHERE = {"bert": _BERT, "bart": _BART}
"""Their token types, norms of embeddings and head's transform are no part that the anatomy has."""
_FEW = ("full mixed", "lora bf16, chunked")
_ALIKE = (
    "qwen2", "gemma2", "phi3", "olmo2", "stablelm", "phi", "gptj", "bloom", "qwen3_moe", "falcon", "flan-t5", "bert",
    "bart",
)  # fmt: skip
"""They share most rules with families that are held with all recipes; a few show theirs."""

pytestmark = [
    # transformers 5.23 renames its checkpointing methods; PEFT 0.21 still calls the old ones.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
    # PEFT says that it has noticed GPT-2's transposed linears.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]


def spec_of(name: str) -> ModelSpec:
    config = (_FAMILIES | _COUNTED_ELSEWHERE)[name]
    tied = bool(config.get("tie_word_embeddings", True))
    facts = {**config, "tie_word_embeddings": tied}
    spec = ModelSpec(name=name, kind="directory", config=facts, num_parameters=1, tied_head=tied)
    return replace(spec, num_parameters=anatomy(spec).num_parameters)


@pytest.mark.parametrize("name", _FAMILIES)
def test_parts_add_up_to_the_built_model(name: str) -> None:
    """The parameters counted from shapes are those that transformers builds."""
    spec = spec_of(name)
    with torch.device("meta"):
        model = skeleton(spec, dtype="bf16", attention=spec.attention)
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.num_parameters


@pytest.mark.parametrize("name", [*_FAMILIES, *_COUNTED_ELSEWHERE])
def test_the_closed_form_is_within_its_band(name: str) -> None:
    """Each recipe's measured peak lies within the closed form's band, and the median error is under 3.5 %."""
    spec, errors = spec_of(name), {}
    for label, settings in _RECIPES.items():
        if (spec.is_encoder_decoder and "packed" in label) or (name in _ALIKE and label not in _FEW):
            continue
        recipe = replace(Recipe(model=name, task=spec.task, seq_len=128, micro_batch_size=2), **settings)
        recipe = recipe.with_values({"memory.attention": spec.attention})
        if name == "gpt2" and recipe.method == "qat":
            continue  # refused: its linear layers are transposed
        measured = measured_trial(spec, recipe).peak.allocated_bytes
        errors[label] = measured / closed_form(spec, recipe).total - 1
    assert all(ERROR_BAND[0] <= error <= ERROR_BAND[1] for error in errors.values()), errors
    assert median(map(abs, errors.values())) < 0.035, errors


@pytest.mark.parametrize("label", ["lora bf16, chunked", "full master, checkpointed"])
def test_the_rough_form_knows_a_scan(label: str) -> None:
    """Of Mamba, whose blocks keep the states of all tokens, the rough form is as near as the closed form of others."""
    spec = ModelSpec(name="mamba", kind="directory", config=_MAMBA, num_parameters=1, tied_head=True)
    with torch.device("meta"):
        model = skeleton(spec, dtype="bf16", attention=spec.attention)
    spec = replace(spec, num_parameters=sum(parameter.numel() for parameter in model.parameters()))
    recipe = replace(Recipe(model="mamba", seq_len=32, micro_batch_size=2), **_RECIPES[label])
    recipe = recipe.with_values({"memory.attention": spec.attention})
    measured = measured_trial(spec, recipe).peak.allocated_bytes
    assert ERROR_BAND[0] <= measured / rough(spec, recipe).total - 1 <= ERROR_BAND[1]


@pytest.mark.parametrize("vocab_size", [100, 32128, 151936, 10**7])
def test_the_chunk_is_the_chunked_losss(vocab_size: int) -> None:
    """The torch-free copy of the chunk's size equals the layer's."""
    assert tokens_of_chunk(vocab_size) == chunk_tokens(vocab_size)
