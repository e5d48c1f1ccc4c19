"""The recipe that a command's options mean."""

import json
from pathlib import Path

import pytest

from brim.cli.options import default_recipe, recipe_of
from brim.models import describe
from brim.recipe import Memory, Recipe

_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500,
}  # fmt: skip
_CLASSIFIER = {**_LLAMA, "architectures": ["LlamaForSequenceClassification"]}


def asked(source: Path, *settings: str) -> Recipe:
    return recipe_of(str(source), method=None, seq_len=None, micro_batch_size=None, settings=list(settings))[0]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(_LLAMA))
    return tmp_path


def test_a_default_recipe_never_holds_all_logits(llama: Path) -> None:
    """Of a model's name alone comes the chunked loss, and the recipe says so; what the user sets is as it was set."""
    assert asked(llama).memory.loss == "chunked"
    assert asked(llama, "memory.loss=full").memory.loss == "full"
    assert 'loss = "chunked"' in asked(llama).to_toml()


def test_whole_bf16_weights_are_rounded_by_chance(llama: Path) -> None:
    """What the default recipe trains without an FP32 copy is rounded so that small updates are not lost; all that has a
    copy, is not BF16, is shared by devices or stepped otherwise is not."""
    assert asked(llama).optimizer.rounding == "stochastic"
    for setting in (
        "optimizer.rounding=nearest", "precision.master=fp32", "method=lora", "optimizer.name=lion", "method=qat",
        "library.adamw=foreach",
    ):  # fmt: skip
        assert asked(llama, setting).optimizer.rounding == "nearest", setting
    assert asked(llama, "precision.weights=fp32", "precision.compute=fp32").optimizer.rounding == "nearest"
    ddp = asked(llama, "parallel.devices_per_node=2", "parallel.sharding=ddp")
    assert ddp.optimizer.rounding == "nearest" and not ddp.warnings()


def test_what_cannot_come_in_chunks_is_whole(llama: Path) -> None:
    """Another library's loss and a classifier have the full loss of themselves, without a word."""
    for setting in ("library.loss=transformers-4.46", "task=sequence-classification"):
        recipe = asked(llama, setting)
        assert recipe.memory.loss == "full" and not recipe.warnings()
    (llama / "config.json").write_text(json.dumps(_CLASSIFIER))
    assert asked(llama).memory.loss == "full"


def test_a_file_means_what_it_says(llama: Path, tmp_path: Path) -> None:
    """A recipe's file is taken key by key: one that is silent about the loss means the recipe's own default."""
    path = tmp_path / "recipe.toml"
    path.write_text(f'model = "{llama}"\n')
    assert asked(path) == Recipe(model=str(llama))


def test_what_a_plan_says_to_type_next_is_its_recipe(llama: Path) -> None:
    """The settings that a recipe has beside the default one bring it back, the full loss among them."""
    start = default_recipe(describe(str(llama)), str(llama))
    wanted = Recipe(model=str(llama), seq_len=32, memory=Memory(loss="full", activation_checkpointing="full"))
    for recipe in (wanted, wanted.with_settings(["optimizer.rounding=stochastic"])):
        whole = start.with_values({"optimizer.rounding": recipe.best_rounding})
        assert asked(llama, *recipe.settings(whole)) == recipe
