"""LoRA: adapters alone learn, and PEFT reads what was learned."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from brim.errors import RecipeError
from brim.models import describe
from brim.recipe import Lora, Recipe
from brim.training.adapters import save_adapter
from brim.training.batches import synthetic_batch
from brim.training.build import Workload
from brim.training.step import train_step

MakeRecipe = Callable[..., Recipe]
MakeWorkload = Callable[[Recipe], Workload]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", Lora(rank=4)),
        ("gpt2", Lora(rank=4)),
        ("t5", Lora(rank=4)),
        ("llama", Lora(rank=4, rslora=True)),
        ("llama", Lora(rank=4, dora=True)),
    ],
    ids=["llama", "gpt2", "t5", "rslora", "dora"],
)
def test_adapters_alone_learn(
    family: str, lora: Lora, make_recipe: MakeRecipe, make_workload: MakeWorkload, tmp_path: Path
) -> None:
    """After steps the base is bitwise what it was, each adapter has moved, and PEFT rebuilds the trained model."""
    recipe = make_recipe(family, method="lora", lora=lora)
    workload, spec = make_workload(recipe), describe(recipe.model)
    before = {name: parameter.detach().clone() for name, parameter in workload.model.named_parameters()}
    for step in range(3):
        train_step(workload, [synthetic_batch(recipe, spec, seed=step)], learning_rate=1e-2)
    for name, parameter in workload.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name
    assert isinstance(workload.model, PeftModel)
    save_adapter(workload.model, spec, tmp_path)
    kind: Any = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    loaded = PeftModel.from_pretrained(kind.from_pretrained(recipe.model), str(tmp_path)).eval()
    workload.model.eval()
    inputs = {"input_ids": torch.arange(1, 13)[None]}
    if family == "t5":
        inputs["decoder_input_ids"] = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(workload.model(**inputs).logits, loaded(**inputs).logits)


def test_a_base_from_the_hub_is_named_by_its_id(
    make_recipe: MakeRecipe, make_workload: MakeWorkload, tmp_path: Path
) -> None:
    """An adapter names the base that anybody can fetch, not the cache of this machine; the Hub is not asked."""
    recipe = make_recipe("llama", method="lora")
    model, spec = make_workload(recipe).model, describe(recipe.model)
    assert isinstance(model, PeftModel)
    for described, expected in (
        (spec, (recipe.model, None)),
        (replace(spec, kind="hub", hub_id="some/model", revision="v2"), ("some/model", "v2")),
    ):
        save_adapter(model, described, tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == expected


@pytest.mark.parametrize(
    ("family", "targets", "count"),
    [
        ("llama", ("q_proj",), 2),
        ("llama", ("self_attn.q_proj", "v_proj"), 4),
        ("llama", ("model.layers.1.mlp.down_proj",), 1),
        ("llama", ("all-linear",), 14),
        ("gpt2", ("c_attn",), 2),
        ("gpt2", ("all-linear",), 8),
        ("t5", ("q", "v"), 12),
    ],
)
def test_targets(
    family: str, targets: tuple[str, ...], count: int, make_recipe: MakeRecipe, make_workload: MakeWorkload
) -> None:
    """A target is the end of a layer's name, transposed layers (GPT-2) too; "all-linear" is all but the head."""
    workload = make_workload(make_recipe(family, method="lora", lora=Lora(rank=2, targets=targets)))
    assert len(workload.trainable) == 2 * count


@pytest.mark.parametrize(
    ("family", "target", "said"),
    [
        ("llama", "q_porj", "did you mean q_proj"),
        ("gpt2", "c_atn", "did you mean c_attn"),
        ("llama", "layers.9.self_attn.q_proj", "has no linear layer"),
        ("llama", "lm_head", "has no linear layer"),
        ("llama", "embed_tokens", "has no linear layer"),
    ],
)
def test_unknown_targets(
    family: str, target: str, said: str, make_recipe: MakeRecipe, make_workload: MakeWorkload
) -> None:
    """A name that is no layer's is refused, even beside one that is, with the nearest that are."""
    known = "c_attn" if family == "gpt2" else "q_proj"
    with pytest.raises(RecipeError, match=said):
        make_workload(make_recipe(family, method="lora", lora=Lora(targets=(known, target))))


def test_rslora_scales_by_the_root_of_the_rank(make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """Adapters are applied times alpha / sqrt(rank) with rsLoRA, alpha / rank without."""
    for rslora, expected in ((True, 32 / 16**0.5), (False, 2.0)):
        workload = make_workload(make_recipe("llama", method="lora", lora=Lora(rank=16, alpha=32, rslora=rslora)))
        scalings = [module.scaling["default"] for module in workload.model.modules() if isinstance(module, LoraLayer)]
        assert scalings and set(scalings) == {expected}


@pytest.mark.parametrize(
    "settings",
    [
        ("method=qlora", "precision.weights=nf4"),
        ("method=lora", "parallel.devices_per_node=2", "parallel.sharding=zero3"),
    ],
)
def test_dora_reads_whole_weights(settings: tuple[str, ...], make_recipe: MakeRecipe) -> None:
    """Where weights are packed or divided, DoRA is refused with the setting that runs."""
    recipe = make_recipe("llama")
    with pytest.raises(RecipeError, match=r"lora\.dora = true reads whole weights.*nearest: lora\.dora = false"):
        recipe.with_settings(["lora.dora=true", *settings])
