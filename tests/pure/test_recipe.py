"""A recipe survives its file, and each way of getting one wrong has its message."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.errors import RecipeError
from brim.recipe import Library, Lora, Memory, Optimizer, Precision, Recipe, Training
from brim.recipe.recipe import SECTIONS

MODEL = "smollm2-135m"
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20)
COUNTS = st.integers(1, 10**6)
PRECISIONS = st.sampled_from(
    [
        Precision(weights="fp32", compute="fp32"),
        Precision(weights="fp32", compute="bf16"),
        Precision(weights="fp32", compute="bf16", master="fp32"),
        Precision(weights="bf16", compute="bf16"),
        Precision(weights="bf16", compute="bf16", master="fp32"),
    ]
)
RECIPES = st.builds(
    Recipe,
    model=NAMES,
    task=st.sampled_from(["causal-lm", "seq2seq-lm"]),
    method=st.sampled_from(["full", "lora"]),
    seq_len=st.integers(2, 10**6),
    target_seq_len=st.integers(0, 10**6),
    micro_batch_size=COUNTS,
    grad_accumulation=COUNTS,
    precision=PRECISIONS,
    optimizer=st.builds(
        Optimizer,
        learning_rate=st.floats(0, 1, exclude_min=True, exclude_max=True),
        weight_decay=st.floats(0, 1e3),
        max_grad_norm=st.floats(0, 1e3),
    ),
    memory=st.builds(
        Memory,
        activation_checkpointing=st.sampled_from(["none", "full"]),
        loss=st.sampled_from(["full", "chunked"]),
        attention=st.sampled_from(["eager", "sdpa"]),
    ),
    training=st.builds(
        Training,
        epochs=COUNTS,
        max_steps=st.integers(0, 10**6),
        warmup_steps=st.integers(0, 10**6),
        schedule=st.sampled_from(["constant", "linear", "cosine"]),
        seed=st.integers(0, 2**32),
    ),
    lora=st.builds(Lora, rank=COUNTS, alpha=COUNTS, targets=st.lists(NAMES, min_size=1, max_size=3).map(tuple)),
)


def keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    found = []
    for key, value in values.items():
        found += keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return found


def nested(path: str, value: object) -> dict[str, Any]:
    """`{"a": {"b": value}}` for `a.b`."""
    for part in reversed(path.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


@given(RECIPES)
@settings(max_examples=150)
def test_toml_round_trip(recipe: Recipe) -> None:
    """What is written is TOML and reads back as the same recipe."""
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


@given(RECIPES)
def test_settings_round_trip(recipe: Recipe) -> None:
    """Each setting given again by `--set` changes nothing."""
    values = tomllib.loads(recipe.to_toml())
    again = [f"{key}={_toml_value(values, key)}" for key in keys(values)]
    assert recipe.with_settings(again) == recipe


@given(RECIPES)
def test_settings_that_differ_give_the_recipe(recipe: Recipe) -> None:
    """What a plan says to type next is the recipe, whatever one starts from, and nothing else is said."""
    for start in (Recipe(model=recipe.model), Recipe(model=recipe.model, memory=Memory(loss="chunked"), num_labels=5)):
        assert start.with_settings(recipe.settings(start)) == recipe
        assert start.settings(start) == []


def _toml_value(values: dict[str, Any], key: str) -> str:
    for part in key.split("."):
        values = values[part]
    if isinstance(values, str):
        return _quoted(values)
    if isinstance(values, list):
        return f"[{', '.join(map(_quoted, values))}]"
    return str(values).lower() if isinstance(values, bool) else repr(values)


def _quoted(text: str) -> str:
    return '"' + "".join(f"\\U{ord(letter):08x}" for letter in text) + '"'


def test_file_round_trip(tmp_path: Path) -> None:
    """A recipe's file is read by its path."""
    recipe = Recipe(model=MODEL, method="lora", lora=Lora(rank=4, targets=("q_proj", "v_proj")))
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.from_toml(path) == recipe


def test_file_that_is_no_recipe_is_named(tmp_path: Path) -> None:
    """A missing file, no TOML and no UTF-8: the message begins with the path."""
    path = tmp_path / "recipe.toml"
    with pytest.raises(RecipeError, match=r"recipe\.toml does not exist"):
        Recipe.from_toml(path)
    for content in (b"model = ", b'model = "\xff"'):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=r"recipe\.toml is not TOML"):
            Recipe.from_toml(path)
    path.write_text('model = "m"\nmicro_batch = 2\n')
    with pytest.raises(RecipeError, match=r"recipe\.toml: unknown key 'micro_batch'"):
        Recipe.from_toml(path)


@pytest.mark.parametrize("key", keys(Recipe(model=MODEL).to_dict()))
def test_misspelt_key_names_the_key_meant(key: str) -> None:
    """Any key with a letter doubled is refused, and the key meant is in the message."""
    section, _, name = key.rpartition(".")
    wrong = f"{section}.{name[0]}{name}" if section else name[0] + name
    with pytest.raises(RecipeError, match=rf"unknown key '{wrong}'; did you mean .*{name}"):
        Recipe.from_dict({"model": MODEL} | nested(wrong, 1))


def test_key_outside_its_section_is_sent_there() -> None:
    """A section's key at the top level is told where it belongs."""
    with pytest.raises(RecipeError, match=r"it belongs in \[lora\], as lora\.rank"):
        Recipe.from_dict({"model": MODEL, "rank": 8})


def test_key_like_no_other_lists_the_known() -> None:
    """A key that resembles none is answered with all of the section."""
    with pytest.raises(RecipeError, match="known: rank, alpha, dropout, targets"):
        Recipe.from_dict({"model": MODEL, "lora": {"zzzzz": 1}})


@pytest.mark.parametrize("values", [{}, {"model": ""}, {"method": "lora"}])
def test_recipe_needs_a_model(values: dict[str, Any]) -> None:
    """Without a model there is nothing to run, and the message shows the line to add."""
    with pytest.raises(RecipeError, match='no model; add a line such as model = "'):
        Recipe.from_dict(values)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seq_len", "long", "seq_len = 'long' is not a whole number"),
        ("seq_len", 1.5, "is not a whole number"),
        ("seq_len", True, "is not a whole number"),
        ("model", 3, "model = 3 is not a text in quotes"),
        ("optimizer.learning_rate", "fast", "is not a number"),
        ("optimizer.in_backward", 1, "is not true or false"),
        ("precision", "bf16", r"precision is a section; write \[precision\]"),
        ("precision.weights", "bf61", "is not one of fp32, bf16, .*did you mean bf16"),
        ("method", "lorra", "is not one of full, lora.*did you mean lora"),
        ("lora.targets", "q_proj", "is not a list of names"),
        ("lora.targets", [1], "is not a list of names"),
        ("lora.targets", [], "lora.targets is empty"),
        ("seq_len", 1, "seq_len = 1 is out of range; the least is 2"),
        ("seq_len", 2**40, "is out of range"),
        ("micro_batch_size", 0, "the least is 1"),
        ("lora.rank", 0, "the least is 1"),
        ("training.max_steps", -1, "the least is 0"),
        ("optimizer.learning_rate", 0, "is not between 0 and 1"),
        ("optimizer.learning_rate", 1, "is not between 0 and 1"),
        ("optimizer.weight_decay", -0.1, "is out of range"),
        ("optimizer.weight_decay", float("nan"), "is out of range"),
        ("optimizer.learning_rate", float("nan"), "is not between 0 and 1"),
    ],
)
def test_wrong_values_say_what_would_do(key: str, value: object, said: str) -> None:
    """A value of the wrong kind or out of range is refused where it is read, with the rule."""
    with pytest.raises(RecipeError, match=said):
        Recipe.from_dict({"model": MODEL} | nested(key, value))


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("parallel.pipeline", 2, "parallel.pipeline = 1"),
    ],
)
def test_what_cannot_run_names_the_nearest_that_can(key: str, value: object, nearest: str) -> None:
    """A setting that this version cannot run is refused when read, with a nearest one, and that one is accepted."""
    with pytest.raises(RecipeError, match=rf"cannot run in this version .*; nearest: {nearest}"):
        Recipe.from_dict({"model": MODEL} | nested(key, value))
    setting, _, text = nearest.partition(" = ")
    Recipe(model=MODEL).with_settings([f"{setting}={text}"])


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        (("parallel.sharding=none",), ("parallel.sharding=zero3",)),
        (("parallel.sharding=hsdp",), ("parallel.sharding=zero3",)),
        (("parallel.sharding=ddp", "parallel.tensor=2"), ("parallel.tensor=1",)),
        (("optimizer.name=adafactor",), ("optimizer.name=adamw8bit",)),
        (("parallel.sharding=zero1", "memory.offload=optimizer"), ("parallel.sharding=zero2", "parallel.tensor=1")),
        (
            ("parallel.sharding=zero1", "optimizer.rounding=stochastic"),
            ("optimizer.rounding=nearest",),
        ),
        (("method=qat",), ("method=lora", "precision.weights=bf16")),
        (("optimizer.in_backward=true", "optimizer.max_grad_norm=0"), ("optimizer.in_backward=false",)),
    ],
)
def test_what_cannot_be_divided_is_refused(settings: tuple[str, ...], nearest: tuple[str, ...]) -> None:
    """Over two devices, what needs whole tensors is refused; what the refusal names is accepted in its place."""
    two = ("parallel.devices_per_node=2", "parallel.sharding=zero3")
    with pytest.raises(RecipeError) as refused:
        Recipe(model=MODEL).with_settings([*two, *settings])
    for setting in nearest:
        key, _, value = setting.partition("=")
        assert f"{key} = {value}" in str(refused.value).replace('"', "")
    assert Recipe(model=MODEL).with_settings([*two, *settings, *nearest]).parallel.data_ranks == 2


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        (("qat.train=adapters", "lora.dropout=0.1"), ("lora.dropout=0",)),
        (("qat.train=adapters", "lora.dora=true"), ("lora.dora=false",)),
        (("qat.train=adapters", 'lora.targets=["q_proj"]'), ('lora.targets=["all-linear"]',)),
        (("qat.activations=int8", "task=seq2seq-lm"), ("qat.activations=none",)),
    ],
)
def test_what_cannot_be_rounded_is_refused(settings: tuple[str, ...], nearest: tuple[str, ...]) -> None:
    """What the refusal names is accepted in its place."""
    with pytest.raises(RecipeError) as refused:
        Recipe(model=MODEL).with_settings(["method=qat", *settings])
    for setting in nearest:
        assert setting.replace("=", " = ").replace('"', "") in str(refused.value).replace('"', "")
    assert Recipe(model=MODEL).with_settings(["method=qat", *settings, *nearest]).method == "qat"


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        (("method=qlora",), ("method=lora",)),
        (("method=qlora", "precision.weights=fp32"), ("precision.weights=nf4",)),
        (("precision.weights=nf4",), ("method=qlora",)),
        (("method=lora", "precision.weights=int4"), ("method=qlora",)),
        (("method=lora", "precision.weights=int8"), ("method=qlora",)),
    ],
)
def test_packed_weights_are_a_frozen_bases(settings: tuple[str, ...], nearest: tuple[str, ...]) -> None:
    """Packed weights and qlora need each other; what the refusal names is accepted in their place."""
    with pytest.raises(RecipeError) as refused:
        Recipe(model=MODEL).with_settings(settings)
    for setting in nearest:
        key, _, value = setting.partition("=")
        assert f'{key} = "{value}"' in str(refused.value)
    assert Recipe(model=MODEL).with_settings([*settings, *nearest]).adapts


def test_what_is_not_packed_is_in_the_compute_format() -> None:
    """Embeddings, norms, head and adapters: as stored; beside packed layers as computed, or FP32 as PEFT casts them."""
    plain = {("bf16", "bf16"): "bf16", ("fp32", "bf16"): "fp32", ("nf4", "bf16"): "bf16", ("nf4", "fp32"): "fp32"}
    for (weights, compute), expected in plain.items():
        method = "qlora" if weights == "nf4" else "full"
        settings = [f"method={method}", f"precision.weights={weights}", f"precision.compute={compute}"]
        assert Recipe(model=MODEL).with_settings(settings).plain_format == expected
    as_peft = ["method=qlora", "precision.weights=nf4", "library.frozen=fp32"]
    assert Recipe(model=MODEL).with_settings(as_peft).plain_format == "fp32"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("grad_accumulation=2", "nearest: grad_accumulation = 1"),
        ("optimizer.max_grad_norm=1.0", "nearest: optimizer.max_grad_norm = 0"),
    ],
)
def test_stepping_in_backward_needs_no_other_gradient(setting: str, said: str) -> None:
    """What needs all gradients at once is refused beside in_backward, and what is named instead is accepted."""
    alone = Recipe(model=MODEL, optimizer=Optimizer(in_backward=True, max_grad_norm=0.0))
    with pytest.raises(RecipeError, match=said):
        alone.with_settings([setting])


def test_fp16_and_t5() -> None:
    """FP16 on a sequence-to-sequence model is refused with the number that overflows."""
    for key in ("weights", "compute"):
        with pytest.raises(RecipeError, match=r"T5-like models.*65504.*precision\.weights = \"bf16\""):
            Recipe.from_dict({"model": MODEL, "task": "seq2seq-lm", "precision": {key: "fp16"}})


def test_fp32_compute_over_bf16_weights() -> None:
    """Matmuls cannot run above the format of their weights."""
    with pytest.raises(RecipeError, match=r"matmul runs in its weights' format, or below FP32; nearest"):
        Recipe(model=MODEL, precision=Precision(weights="bf16", compute="fp32"))


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        ((), ("precision.master=fp32",)),
        (("precision.master=fp32", "optimizer.in_backward=true", "optimizer.max_grad_norm=0.0"),
         ("precision.weights=bf16", "precision.compute=bf16")),
    ],
)  # fmt: skip
def test_fp16_needs_room_for_small_numbers(settings: tuple[str, ...], nearest: tuple[str, ...]) -> None:
    """FP16 without FP32 copies, and steps before the overflow is known, are refused; what is named is accepted."""
    fp16 = ("precision.weights=fp16", "precision.compute=fp16")
    with pytest.raises(RecipeError, match=r"FP16.*nearest"):
        Recipe(model=MODEL).with_settings([*fp16, *settings])
    Recipe(model=MODEL).with_settings([*fp16, *settings, *nearest])
    Recipe(model=MODEL).with_settings(["precision.weights=fp32", "precision.compute=fp16"])


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(model=MODEL, precision=Precision(weights="fp32", master="fp32")), "precision.master"),
        (Recipe(model=MODEL, lora=Lora(rank=4)), "[lora] has no effect"),
        (Recipe(model=MODEL, library=Library(cache="kept")), "library.cache has no effect"),
        (Recipe(model=MODEL, target_seq_len=4), "target_seq_len has no effect"),
        (Recipe(model=MODEL, training=Training(max_steps=5, warmup_steps=5)), "warmup_steps"),
    ],
)
def test_settings_without_effect_are_warned_about(recipe: Recipe, said: str) -> None:
    """A setting that changes nothing is named; the plain recipe has no warnings."""
    assert [said in warning for warning in recipe.warnings()] == [True]
    assert Recipe(model=MODEL).warnings() == []


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("precision.weights", "has no '='"),
        ("precison.weights=fp32", "unknown section 'precison'; did you mean precision"),
        ("precision.weight=fp32", "unknown key 'precision.weight'; did you mean weights"),
        ("precision=fp32", "precision is a section"),
        ("seq_len.deep=3", "unknown section 'seq_len'"),
        ("model=", "no model"),
    ],
)
def test_settings_that_are_wrong(setting: str, said: str) -> None:
    """`--set` refuses what the file would, and a setting without a value."""
    with pytest.raises(RecipeError, match=said):
        Recipe(model=MODEL).with_settings([setting])


def test_settings_read_bare_words_and_numbers() -> None:
    """`--set` takes TOML values; a bare word is a text; later settings win."""
    recipe = Recipe(model=MODEL).with_settings(
        ["method=lora", "lora.rank=8", "lora.rank=4", 'lora.targets=["q_proj"]', "optimizer.learning_rate=1e-4"]
    )
    assert recipe.method == "lora"
    assert recipe.lora == Lora(rank=4, targets=("q_proj",))
    assert recipe.optimizer.learning_rate == 1e-4


def test_tokens_per_step() -> None:
    """A step reads rows x accumulation; a sequence-to-sequence row is source and target."""
    recipe = Recipe(model=MODEL, seq_len=100, micro_batch_size=3, grad_accumulation=2)
    assert recipe.tokens_per_step == 600
    assert dataclasses.replace(recipe, task="seq2seq-lm").tokens_per_step == 1200
    assert dataclasses.replace(recipe, task="seq2seq-lm", target_seq_len=20).tokens_per_step == 720


def test_sections_are_the_contract() -> None:
    """The file's sections are those of the contract, and every recipe can be hashed and compared."""
    assert {"precision", "optimizer", "memory", "training", "lora", "qat", "parallel", "library"} == SECTIONS
    assert len({Recipe(model=MODEL), Recipe(model=MODEL), Recipe(model="other")}) == 2
