"""Every family that Brim names is rehearsed as it runs: small models, a few recipes each.

`make exactness` runs the whole matrix of families and levers; its table is docs/exactness.md.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from brim.errors import RecipeError
from brim.hardware import Device
from brim.memory import rough
from brim.models import ModelSpec
from brim.models.families import EAGER_ONLY, ENCODERS
from brim.models.skeleton import attention_kernels, skeleton
from brim.planning import Constraints, Offer, plan
from brim.recipe import Memory, Precision, Recipe, Task
from brim.rehearsal import rehearse
from brim.report import LEDGER_LINES, Prediction
from brim.training.build import Workload, build
from brim.training.trial import measured_trial

_CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "families.json").read_text(encoding="utf-8")
)
_CLASSIFIERS = ("bert", "roberta", "llama", "gpt-2", "mixtral")
_CASES = [(name, False) for name in _CONFIGS] + [(name, True) for name in _CLASSIFIERS]
_FP32 = Precision(weights="fp32", compute="fp32")
_RECIPES: dict[str, dict[str, Any]] = {
    "full fp32, checkpointed, chunked": {
        "precision": _FP32,
        "memory": Memory(activation_checkpointing="full", loss="chunked"),
    },
    "full master": {"precision": Precision(master="fp32")},
    "lora mixed": {"method": "lora", "precision": Precision(weights="fp32", compute="bf16")},
}
# A classifier's peak is a matmul in some block. On a CPU those in BF16 use scratch memory of a size that depends on
# the processor and that nobody can see from outside the operator, so the law holds for FP32.
_CLASSIFIERS_RECIPES: dict[str, dict[str, Any]] = {
    "full fp32, checkpointed": {"precision": _FP32, "memory": Memory(activation_checkpointing="full")},
    "lora fp32": {"method": "lora", "precision": _FP32},
}
_DEVICE = Device(
    name="test", kind="cpu", memory_bytes=2**34, memory_free_bytes=2**34, cores=1,
    bandwidth_bytes_per_s=1e10, flops={"fp32": 1e11, "bf16": 1e11},
)  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]


def spec_of(name: str) -> ModelSpec:
    config = _CONFIGS[name]
    spec = ModelSpec(
        name=name, kind="directory", config=config, num_parameters=1, tied_head=config.get("tie_word_embeddings", True)
    )
    with torch.device("meta"):
        model = skeleton(spec, dtype="bf16", attention=spec.attention)
    return replace(spec, num_parameters=sum(parameter.numel() for parameter in model.parameters()))


def recipe_of(spec: ModelSpec, settings: dict[str, Any], *, classifies: bool = False) -> Recipe:
    task: Task = "sequence-classification" if classifies else spec.task
    recipe = replace(Recipe(model=spec.name, task=task, seq_len=48, micro_batch_size=2), **settings)
    return replace(recipe, memory=replace(recipe.memory, attention=spec.attention))


def rehearsed(spec: ModelSpec, recipe: Recipe) -> Prediction:
    return rehearse(spec, recipe, device=_DEVICE, budget_bytes=_DEVICE.memory_bytes)


@pytest.mark.parametrize(("name", "classifies"), _CASES, ids=[f"{n}{'-classifier' * c}" for n, c in _CASES])
def test_a_family_is_rehearsed_as_it_runs(name: str, classifies: bool) -> None:
    """Peak and ledger of the rehearsal are those that the profiler measures, within 0.1 %; the rough form's band holds.

    Random weights with a fixed seed give the experts one routing; their sizes do not depend on it.
    """
    spec = spec_of(name)
    for label, settings in (_CLASSIFIERS_RECIPES if classifies else _RECIPES).items():
        recipe = recipe_of(spec, settings, classifies=classifies)
        ours, theirs = rehearsed(spec, recipe), measured_trial(spec, recipe)
        allowed = 0.001 * theirs.peak.allocated_bytes
        assert abs(ours.peak.allocated_bytes - theirs.peak.allocated_bytes) <= allowed, label
        for line in LEDGER_LINES:
            assert abs(getattr(ours.ledger, line) - getattr(theirs.ledger, line)) <= allowed, (label, line)
        error = theirs.peak.allocated_bytes / rough.rough(spec, recipe).total - 1
        assert rough.ERROR_BAND[0] <= error <= rough.ERROR_BAND[1], label


def test_the_routing_of_experts_does_not_change_the_peak() -> None:
    """A router that sends every token to the same experts takes the memory of one that spreads them."""
    spec = spec_of("mixtral")
    recipe = recipe_of(spec, {"precision": _FP32})

    def prefer_the_first(workload: Workload) -> None:
        for name, parameter in workload.model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.data[:2] += 100.0 * parameter.data.mean(dim=0).sign()

    spread, sent_to_two = (
        measured_trial(spec, recipe, steps=1),
        measured_trial(spec, recipe, steps=1, prepare=prefer_the_first),
    )
    assert spread.peak == sent_to_two.peak


def test_the_tables_are_transformers_own() -> None:
    """`EAGER_ONLY` holds exactly the families whose class has no SDPA; each of `ENCODERS` has a masked-lm class."""
    maps = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )
    classes = {(family, name) for table in maps for family, name in table.items()}
    without = {family for family, name in classes if not getattr(transformers, name)._supports_sdpa}
    assert without == EAGER_ONLY
    assert set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES) >= ENCODERS


def test_attention_that_a_family_lacks_is_refused() -> None:
    """BLOOM has no SDPA: the builder says so and names what it has."""
    spec = spec_of("bloom")
    assert attention_kernels(spec) == ("eager",)
    recipe = Recipe(model="bloom", seq_len=16, memory=Memory(attention="sdpa"))
    with pytest.raises(RecipeError, match=r'nearest: memory\.attention = "eager"'):
        build(recipe, spec)


@pytest.mark.parametrize("name", ["bert", "bloom"])
def test_a_family_without_a_closed_form_is_planned(name: str) -> None:
    """A plan for a family that the closed form does not know puts a rehearsed recipe that fits first."""
    spec, budget = spec_of(name), 2**23
    best = plan(
        spec,
        [Offer(device=_DEVICE, budget_bytes=budget)],
        rehearse=lambda recipe, offer: rehearse(spec, recipe, device=offer.device, budget_bytes=offer.budget_bytes),
        constraints=Constraints(seq_len=32, settings=("micro_batch_size=1", "precision.weights=fp32")),
    ).best
    assert best is not None
    assert best.peak.allocated_bytes <= budget
    assert best.recipe["task"] == spec.task
