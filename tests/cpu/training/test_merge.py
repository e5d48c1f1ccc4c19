"""A merged model is the trained one: transformers loads it, and it gives the logits of base and adapter together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from brim.checkpoints import writer
from brim.cli import main
from brim.models import describe
from brim.recipe import Lora, Precision, Recipe
from brim.training import merge
from brim.training.batches import synthetic_batch
from brim.training.build import Workload
from brim.training.merge import write_merged
from brim.training.step import train_step

MakeRecipe = Callable[..., Recipe]
MakeWorkload = Callable[[Recipe], Workload]
Captured = pytest.CaptureFixture[str]
KINDS: dict[str, Any] = {"t5": AutoModelForSeq2SeqLM}
NF4 = Precision(weights="nf4", compute="fp32")
INT8 = Precision(weights="int8", compute="fp32")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]


def trained(recipe: Recipe, make_workload: MakeWorkload) -> Workload:
    workload, spec = make_workload(recipe), describe(recipe.model)
    for step in range(3):
        train_step(workload, [synthetic_batch(recipe, spec, seed=step)], learning_rate=1e-2)
    workload.model.eval()
    return workload


def logits(model: Any, family: str) -> torch.Tensor:
    inputs = {"input_ids": torch.arange(1, 13)[None]}
    if family == "t5":
        inputs["decoder_input_ids"] = torch.arange(12)[None]
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"method": "lora"}),
        ("gpt2", {"method": "lora"}),
        ("t5", {"method": "lora"}),
        ("llama", {"method": "lora", "lora": Lora(rank=4, dora=True)}),
        ("gpt2", {"method": "lora", "lora": Lora(rank=4, dora=True, rslora=True)}),
        ("llama", {"method": "qlora", "precision": NF4}),
        ("gpt2", {"method": "qlora", "precision": INT8}),
        ("t5", {"method": "qlora", "precision": NF4}),
    ],
    ids=["llama", "gpt2", "t5", "llama dora", "gpt2 dora", "llama nf4", "gpt2 int8", "t5 nf4"],
)
def test_transformers_loads_the_trained_model(
    family: str, settings: dict[str, Any], make_recipe: MakeRecipe, make_workload: MakeWorkload, tmp_path: Path
) -> None:
    """Every tensor is found and none is left over; logits are those of the trained model, within FP32's rounding."""
    workload = trained(make_recipe(family, **{"lora": Lora(rank=4), **settings}), make_workload)
    assert isinstance(workload.model, PeftModel)
    expected = logits(workload.model, family)
    write_merged(workload.model, tmp_path)
    kind = KINDS.get(family, AutoModelForCausalLM)
    loaded, loading = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded.eval(), family), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(workload.model, family), expected, atol=0, rtol=0)


def test_a_classifiers_head_is_the_trained_one(
    make_recipe: MakeRecipe, make_workload: MakeWorkload, tmp_path: Path
) -> None:
    """The head that was trained beside the adapter is the merged model's, not the one that it began as."""
    workload = trained(make_recipe("llama", method="lora", task="sequence-classification"), make_workload)
    assert isinstance(workload.model, PeftModel)
    inputs = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected = workload.model(input_ids=inputs).logits
        write_merged(workload.model, tmp_path)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_16_bits_are_rounded_once(make_recipe: MakeRecipe, make_workload: MakeWorkload, tmp_path: Path) -> None:
    """Each weight is the exact sum of base and adapter, computed in FP64, rounded to BF16."""
    recipe = make_recipe("llama", method="lora", lora=Lora(rank=4), precision=Precision())
    workload = trained(recipe, make_workload)
    assert isinstance(workload.model, PeftModel)
    write_merged(workload.model, tmp_path)
    layer = workload.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    exact = layer.base_layer.weight.double() + layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
    assert written.dtype == torch.bfloat16
    off = (written.double() - exact).abs() > (1 + 1e-5) * 2**-8 * exact.abs() + 1e-7
    assert not off.any()


def test_shards_and_their_index(
    make_recipe: MakeRecipe, make_workload: MakeWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model over the limit of a file is split, and transformers reads it all the same."""
    workload = trained(make_recipe("llama", method="lora"), make_workload)
    assert isinstance(workload.model, PeftModel)
    whole = writer.plan_shards
    monkeypatch.setattr(merge, "plan_shards", lambda groups: whole(groups, limit_bytes=10_000))
    write_merged(workload.model, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, "llama"), logits(workload.model, "llama"), atol=1e-4, rtol=1e-4)


def test_tune_publishes_both(tiny_directory: Callable[[str], Path], tmp_path: Path, capsys: Captured) -> None:
    """`brim tune --merge` leaves the adapter as without it, and in `merged` a model with tokenizer that Brim reads."""
    data, output = tmp_path / "data.txt", tmp_path / "out"
    data.write_text("Filled to the brim and never over it.\n" * 20)
    small = ["--seq-len", "16", "--max-steps", "2", "--set", "precision.weights=fp32"]
    small += ["--set", "precision.compute=fp32"]
    command = ["tune", str(tiny_directory("llama")), "--data", str(data), *small, "--output", str(output), "--merge"]
    assert main([*command, "--method", "full"]) == 2
    assert "trains none" in capsys.readouterr().err
    assert main([*command, "--method", "lora", "--json"]) == 0
    assert (output / "adapter_model.safetensors").is_file()
    merged = describe(str(output / "merged"))
    assert merged.num_parameters == describe(str(tiny_directory("llama"))).num_parameters
    assert (output / "merged" / "tokenizer_config.json").is_file()
    config = json.loads((output / "merged" / "config.json").read_text())
    assert config["use_cache"] and config["architectures"] == ["LlamaForCausalLM"]
