"""The closed form of a rank that shares each matrix with others, against the rehearsal of it on an imagined group."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig

from brim.hardware import find
from brim.memory.closed_form import ERROR_BAND
from brim.memory.tensor import DIVIDED_FAMILIES
from brim.models import ModelSpec
from brim.models.count import count_from_config
from brim.planning.estimate import on_device
from brim.recipe import Recipe
from brim.rehearsal import rehearse_trace

_GPU = find("h100")
_LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8000, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
_QWEN: dict[str, Any] = {**_LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}
_TWO = ("parallel.devices_per_node=2", "parallel.tensor=2")
_CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "activations rule": (_LLAMA, (*_TWO, "seq_len=256")),
    "masters rule": (_LLAMA, (*_TWO, "seq_len=32", "precision.master=fp32")),
    "parameters rule": (_LLAMA, (*_TWO, "seq_len=32", "optimizer.name=sgd", "memory.activation_checkpointing=full")),
    "chunked, checkpointed": (
        _LLAMA, (*_TWO, "seq_len=256", "memory.loss=chunked", "memory.activation_checkpointing=full"),
    ),
    "adapters": (_LLAMA, (*_TWO, "seq_len=128", "method=lora")),
    "a tied head": (_QWEN, (*_TWO, "seq_len=64", "precision.weights=fp32", "precision.compute=fp32")),
    "and shares of the rest": (
        _LLAMA, ("parallel.devices_per_node=4", "parallel.tensor=2", "parallel.sharding=zero3", "seq_len=64"),
    ),
    "and shares of states": (
        _QWEN, ("parallel.devices_per_node=4", "parallel.tensor=2", "parallel.sharding=zero2", "seq_len=64"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", _CASES)
def test_a_share_of_each_matrix_is_near_its_rehearsal(case: str) -> None:
    """Within the band that the search allows for, whichever moment is the peak."""
    config, settings = _CASES[case]
    spec = ModelSpec(name="m", kind="directory", config=config, num_parameters=1, tied_head=config is _QWEN)
    spec = replace(spec, num_parameters=count_from_config(spec))
    recipe = Recipe(model="m", micro_batch_size=2).with_settings(settings)
    exact = rehearse_trace(spec, recipe).peak_bytes
    error = exact / on_device(spec, recipe, _GPU)[0].total - 1
    assert ERROR_BAND[0] <= error <= ERROR_BAND[1], f"{error:+.1%}"


def test_families_are_those_whose_matrices_transformers_divides_so() -> None:
    """Of each family, attention and feed-forward: into it by outputs, out of it by inputs, and nothing else."""
    for family in sorted(DIVIDED_FAMILIES):
        plan = AutoConfig.for_model(family).base_model_tp_plan
        styles = {name.rpartition(".")[2]: style for name, style in plan.items() if name.startswith("layers.")}
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            assert styles[name] == "colwise", family
        for name in ("o_proj", "down_proj"):
            assert styles[name] == "rowwise", family
