"""Laws of advice: what would save most is computed, sorted, and never raises the peak."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.cli import main
from brim.errors import RecipeError
from brim.hardware import Device, find
from brim.memory.anatomy import anatomy
from brim.models import ModelSpec
from brim.planning import advise
from brim.planning.advice import LEVERS, SHORT_LIST, smaller_micro_batch
from brim.planning.estimate import estimate
from brim.recipe import Recipe
from brim.report import Prediction
from brim.units import GIB

GPU = find("rtx-4090")
_CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8,
    "num_attention_heads": 4, "vocab_size": 8000, "max_position_embeddings": 2048,
}  # fmt: skip
_UNCOUNTED = ModelSpec(name="small", kind="directory", config=_CONFIG, num_parameters=1, tied_head=True)
SPEC = replace(_UNCOUNTED, num_parameters=anatomy(_UNCOUNTED).num_parameters)
BUDGET = 2 * GIB


def predict(recipe: Recipe) -> Prediction:
    return estimate(SPEC, recipe, device=GPU, budget_bytes=BUDGET)


RECIPES = st.builds(
    lambda rows, turns, length, chosen: Recipe(
        model="small", micro_batch_size=rows, grad_accumulation=turns, seq_len=length
    ).with_settings(chosen),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from([64, 255, 1024]),
    st.sampled_from(
        [
            (),
            ("precision.weights=fp32", "precision.compute=fp32"),
            ("precision.master=fp32",),
            ("method=lora",),
            ("method=qlora", "precision.weights=nf4"),
            ("memory.activation_checkpointing=full", "memory.loss=chunked"),
            ("optimizer.name=adafactor", "memory.attention=eager"),
        ]
    ),
)


@settings(max_examples=40, deadline=None)
@given(RECIPES)
def test_a_saving_is_the_difference_of_two_predictions(recipe: Recipe) -> None:
    """Each line is what predicting the recipe with those settings says, sorted by bytes saved; none saves nothing."""
    now = predict(recipe)
    found = advise(SPEC, recipe, now, device=GPU, predict=predict)
    for advice in found:
        apart = predict(recipe.with_settings(advice.settings))
        assert advice.saved_bytes == now.peak.highest_bytes - apart.peak.highest_bytes > 0
        assert (advice.peak_bytes, advice.fits) == (apart.peak.highest_bytes, apart.fits)
        assert advice.tokens_per_s == apart.tokens_per_s
    saved = [advice.saved_bytes for advice in found]
    assert saved == sorted(saved, reverse=True)


@settings(max_examples=40, deadline=None)
@given(RECIPES)
def test_no_lever_that_saves_is_left_out(recipe: Recipe) -> None:
    """Of all levers that can run and be predicted, each that lowers the peak is named."""
    now = predict(recipe)
    saving = set()
    for lever in LEVERS:
        chosen = tuple(lever.settings(recipe, GPU))
        try:
            then = predict(recipe.with_settings(chosen))
        except ValueError:
            continue
        if then.peak.highest_bytes < now.peak.highest_bytes:
            saving.add(chosen)
    assert {advice.settings for advice in advise(SPEC, recipe, now, device=GPU, predict=predict)} == saving


@given(RECIPES)
def test_a_smaller_micro_batch_keeps_the_global_batch(recipe: Recipe) -> None:
    changed = recipe.with_settings(smaller_micro_batch(recipe, GPU))
    assert changed.rows_per_step == recipe.rows_per_step
    assert changed.micro_batch_size < recipe.micro_batch_size or recipe.micro_batch_size == 1


def test_the_short_list_asks_the_predictor_a_few_times() -> None:
    """The short list holds no more than its number, and asked for no more than that."""
    recipe = Recipe(model="small", micro_batch_size=8)
    asked: list[Recipe] = []

    def counted(changed: Recipe) -> Prediction:
        asked.append(changed)
        return predict(changed)

    found = advise(SPEC, recipe, predict(recipe), device=GPU, predict=counted, num_tried=SHORT_LIST)
    whole = advise(SPEC, recipe, predict(recipe), device=GPU, predict=predict)
    assert len(asked) == SHORT_LIST and found == whole[:SHORT_LIST]


def test_a_lever_that_cannot_be_predicted_is_left_out() -> None:
    """A predictor's refusal costs that lever and no other."""
    recipe = Recipe(model="small", micro_batch_size=8)

    def refusing(changed: Recipe) -> Prediction:
        if changed.memory.loss == "chunked":
            raise RecipeError("no")
        return predict(changed)

    found = advise(SPEC, recipe, predict(recipe), device=GPU, predict=refusing)
    whole = advise(SPEC, recipe, predict(recipe), device=GPU, predict=predict)
    assert found == tuple(advice for advice in whole if advice.settings != ("memory.loss=chunked",))
    assert len(found) == len(whole) - 1


def test_more_devices_are_advised_where_they_have_memory_of_their_own() -> None:
    """More processes on one CPU share its memory; two GPUs hold half of the states each, and as many rows a step."""
    cpu = Device(
        name="cpu", kind="cpu", memory_bytes=GIB, memory_free_bytes=GIB, flops={"fp32": 1e10, "bf16": 1e10},
        bandwidth_bytes_per_s=1e10, cores=2,
    )  # fmt: skip
    recipe = Recipe(model="small", grad_accumulation=4)
    more = [tuple(lever.settings(recipe, GPU)) for lever in LEVERS if not lever.settings(recipe, cpu)]
    many = [recipe.with_settings(chosen) for chosen in more if chosen]
    assert [(r.parallel.devices, r.parallel.sharding, r.rows_per_step) for r in many] == [(2, "zero3", 4)]


def test_advice_comes_by_itself_when_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe over its budget gets the short list unasked; one that fits gets none; --advice gives all."""
    question = ["predict", "smollm2-135m", "--quick", "--json", "--micro-batch-size", "4", "--memory"]
    assert main([*question, "1GiB"]) == 0
    over = json.loads(capsys.readouterr().out)
    assert not over["fits"] and 0 < len(over["advice"]) <= SHORT_LIST
    assert main([*question, "64GiB"]) == 0
    assert "advice" not in json.loads(capsys.readouterr().out)
    assert main([*question, "64GiB", "--advice"]) == 0
    assert len(json.loads(capsys.readouterr().out)["advice"]) > SHORT_LIST
