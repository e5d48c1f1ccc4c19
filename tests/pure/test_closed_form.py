"""Laws of the closed form and of the roofline; tests/cpu holds it against measured runs."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.errors import UsageError
from brim.hardware import Device
from brim.memory.anatomy import anatomy
from brim.memory.closed_form import closed_form, moments
from brim.models import ModelSpec
from brim.recipe import Memory, Precision, Recipe
from brim.report import LEDGER_LINES
from brim.speed import step_time, step_work, tokens_per_s

LLAMA = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
T5 = {
    "model_type": "t5", "d_model": 512, "d_ff": 2048, "d_kv": 64, "num_heads": 8, "num_layers": 6,
    "num_decoder_layers": 6, "vocab_size": 32128, "is_encoder_decoder": True,
}  # fmt: skip

DEVICE = Device(
    name="cpu",
    kind="cpu",
    memory_bytes=2**34,
    memory_free_bytes=2**34,
    flops={"fp32": 5e10, "bf16": 1e11, "fp16": 1e11},
    bandwidth_bytes_per_s=1e10,
    cores=2,
)


def spec_of(config: dict[str, Any], *, tied: bool = True) -> ModelSpec:
    spec = ModelSpec(name="m", kind="directory", config=config, num_parameters=1, tied_head=tied)
    return replace(spec, num_parameters=anatomy(spec).num_parameters)


SPECS = {str(config["model_type"]): spec_of(config) for config in (LLAMA, GPT2, T5)}

PRECISIONS = (
    Precision(weights="fp32", compute="fp32"),
    Precision(weights="fp32", compute="bf16"),
    Precision(weights="bf16", compute="bf16"),
    Precision(weights="bf16", compute="bf16", master="fp32"),
)
MEMORIES = tuple(
    Memory(activation_checkpointing=checkpointing, loss=loss, attention=attention)
    for checkpointing in ("none", "full")
    for loss in ("full", "chunked")
    for attention in ("sdpa", "eager")
)


@st.composite
def questions(draw: st.DrawFn) -> tuple[ModelSpec, Recipe]:
    spec = draw(st.sampled_from(list(SPECS.values())))
    return spec, Recipe(
        model="m",
        task=spec.task,
        method=draw(st.sampled_from(("full", "lora"))),
        seq_len=draw(st.integers(16, 1024)),
        micro_batch_size=draw(st.integers(1, 8)),
        grad_accumulation=draw(st.sampled_from((1, 4))),
        precision=draw(st.sampled_from(PRECISIONS)),
        memory=draw(st.sampled_from(MEMORIES)),
    )


@pytest.mark.parametrize(
    ("config", "tied", "published"),
    [(LLAMA, True, 134_515_008), (GPT2, True, 124_439_808), (T5, True, 60_506_624)],
    ids=["SmolLM2-135M", "GPT-2", "T5-small"],
)
def test_parts_add_up_to_the_published_count(config: dict[str, Any], tied: bool, published: int) -> None:
    """The parameters of the parts, counted from shapes, are the model's published parameters."""
    assert spec_of(config, tied=tied).num_parameters == published


def test_an_untied_head_is_counted_once_more() -> None:
    """Untying adds exactly vocabulary x hidden size."""
    tied, untied = spec_of(LLAMA), spec_of(LLAMA, tied=False)
    assert untied.num_parameters - tied.num_parameters == 49152 * 576


@given(questions())
@settings(max_examples=60, deadline=None)
def test_the_peak_is_a_moment_and_its_lines_add_up(question: tuple[ModelSpec, Recipe]) -> None:
    """No moment exceeds the peak, no line is negative, weights are exact, and lines sum to the total."""
    spec, recipe = question
    ledger = closed_form(spec, recipe)
    assert ledger.total == sum(getattr(ledger, line) for line in LEDGER_LINES)
    assert ledger.total == max(moment.total for moment in moments(spec, recipe).values())
    assert min(ledger.to_dict().values()) >= 0
    stored = 4 if recipe.precision.weights == "fp32" else 2
    assert ledger.weights >= stored * spec.num_parameters
    assert (ledger.weights == stored * spec.num_parameters) == (recipe.method == "full")


@given(questions(), st.sampled_from(("micro_batch_size", "seq_len")), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_more_tokens_never_take_less_memory_or_time(question: tuple[ModelSpec, Recipe], key: str, more: int) -> None:
    """Peak and step time rise with the micro-batch and with the sequence."""
    spec, recipe = question
    values = recipe.to_dict()
    larger = Recipe.from_dict({**values, key: values[key] + more})
    assert closed_form(spec, larger).total >= closed_form(spec, recipe).total
    assert step_time(spec, larger, DEVICE) > step_time(spec, recipe, DEVICE)


@given(questions())
@settings(max_examples=60, deadline=None)
def test_checkpointing_trades_time_for_memory(question: tuple[ModelSpec, Recipe]) -> None:
    """Checkpointing never makes what blocks keep larger than the whole, and always costs time."""
    spec, recipe = question
    without = replace(recipe, memory=replace(recipe.memory, activation_checkpointing="none"))
    with_it = replace(recipe, memory=replace(recipe.memory, activation_checkpointing="full"))
    assert moments(spec, with_it)["loss"].total < moments(spec, without)["loss"].total
    assert step_time(spec, with_it, DEVICE) > step_time(spec, without, DEVICE)


def test_accumulation_keeps_all_gradients_alive() -> None:
    """With two micro-batches, the gradients of the first are alive at the loss of the second."""
    recipe = Recipe(model="m", seq_len=256)
    once = moments(SPECS["llama"], recipe)["loss"]
    twice = moments(SPECS["llama"], replace(recipe, grad_accumulation=2))["loss"]
    assert once.gradients == 0
    assert twice.gradients == 2 * SPECS["llama"].num_parameters


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_selective_checkpointing_is_between(family: str) -> None:
    """Keeping linears' results takes more memory than keeping none and less than keeping all; so does its work."""
    kinds = [
        Recipe(model="m", seq_len=512, memory=Memory(activation_checkpointing=kind))
        for kind in ("full", "selective", "none")
    ]
    full, selective, none = (moments(SPECS[family], recipe)["loss"].activations for recipe in kinds)
    assert full < selective < none
    again, between, once = (step_work(SPECS[family], recipe).flops for recipe in kinds)
    assert again > between > once


def test_optimizer_states_by_hand() -> None:
    """AdamW: two moments in the trained format; over BF16 with a master, 12 bytes a parameter."""
    count = SPECS["gpt2"].num_parameters
    by_precision = [
        closed_form(SPECS["gpt2"], Recipe(model="m", precision=precision)).optimizer // count
        for precision in PRECISIONS
    ]
    assert by_precision == [8, 8, 4, 12]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_of_a_decoder_are_six_per_parameter_and_token(family: str) -> None:
    """Full fine-tuning at a short sequence: 6 N D, N the parameters that tokens are multiplied with."""
    spec, recipe = SPECS[family], Recipe(model="m", seq_len=16)
    parts = anatomy(spec)
    multiplied = parts.block_linear_parameters + parts.embedding_parameters
    assert step_work(spec, recipe).flops == pytest.approx(6 * multiplied * 16, rel=0.02)
    lora = step_work(spec, replace(recipe, method="lora")).flops
    assert 4 * multiplied * 16 < lora < 5 * multiplied * 16


def test_flops_of_an_encoder_decoder_are_half_of_that() -> None:
    """3 N D with source and target tokens counted together, cross-attention aside: not 6 N D."""
    spec, recipe = SPECS["t5"], Recipe(model="m", task="seq2seq-lm", seq_len=32)
    blocks = anatomy(spec).block_linear_parameters
    tokens = recipe.tokens_per_step
    head = 6 * anatomy(spec).embedding_parameters * 32
    assert step_work(spec, recipe).flops - head == pytest.approx(3 * blocks * tokens, rel=0.05)


def test_time_follows_the_device() -> None:
    """A device twice as fast in everything takes half the time; tokens per second are its inverse."""
    recipe = Recipe(model="m", seq_len=128, micro_batch_size=2, grad_accumulation=4)
    twice = replace(
        DEVICE, flops={"fp32": 1e11, "bf16": 2e11, "fp16": 2e11}, bandwidth_bytes_per_s=2 * DEVICE.bandwidth_bytes_per_s
    )
    seconds = step_time(SPECS["llama"], recipe, DEVICE)
    assert step_time(SPECS["llama"], recipe, twice) == pytest.approx(seconds / 2)
    assert tokens_per_s(recipe, seconds) == pytest.approx(128 * 2 * 4 / seconds)


def test_an_unknown_family_is_refused_by_name() -> None:
    """No guess for a family without a row: the error names the known ones."""
    mamba = ModelSpec(name="m", kind="directory", config={"model_type": "mamba"}, num_parameters=1, tied_head=True)
    with pytest.raises(UsageError, match=r"'mamba'.*known: llama"):
        closed_form(mamba, Recipe(model="m"))
