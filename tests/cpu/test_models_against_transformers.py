"""Descriptions against transformers: what is counted is what it builds, what is read is what it wrote."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from brim.models import ModelSpec, catalogue, describe
from brim.models.count import count_from_config
from brim.models.read_weights import read_linears
from brim.models.skeleton import skeleton

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 1},
    "qwen3": {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8},
    "gemma3_text": {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 64},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "is_encoder_decoder": True},
}
COMMON = {"num_hidden_layers": 2, "num_attention_heads": 2}


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A model of this family that is built in milliseconds."""
    sizes = FAMILIES[family] | ({} if family in ("gpt2", "t5") else COMMON)
    config = AutoConfig.for_model(family, vocab_size=48, pad_token_id=0, **(sizes | changes))
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return auto.from_config(config)


def is_tied(model: PreTrainedModel) -> bool:
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_size", ["1GB", "8KB"])
def test_a_saved_model_is_described_as_it_was(family: str, shard_size: str, tmp_path: Path) -> None:
    """Parameters, tie, task and stored bytes of a saved model are those of the model, in one file or in shards."""
    model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    spec = describe(str(tmp_path))
    assert spec.num_parameters == model.num_parameters()
    assert spec.tied_head == is_tied(model)
    assert spec.stored_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert (spec.task == "seq2seq-lm") == (family == "t5")


def test_building_a_model_leaves_its_description_alone() -> None:
    """transformers completes nested settings of the config that it is given (rope_scaling); ours stays as read."""
    spec = describe("llama-3.1-8b")
    before = repr(spec)
    with torch.device("meta"):
        skeleton(spec, dtype="bf16", attention="sdpa")
    assert repr(spec) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_form_counts_a_config_of_any_size(family: str) -> None:
    """The closed form counts what transformers builds, tied and untied."""
    for tie in (True, False) if family != "t5" else (True,):
        model = tiny(family, tie_word_embeddings=tie)
        spec = ModelSpec(
            name=family, kind="directory", config=model.config.to_dict(), num_parameters=0, tied_head=is_tied(model)
        )
        assert count_from_config(spec) == model.num_parameters()


def test_t5_with_a_head_of_its_own_is_seen_in_its_file(tmp_path: Path) -> None:
    """FLAN-T5's case: the config's class ties, the file has another head, and the file decides, as in transformers."""
    model = tiny("t5")
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn_like(head.weight))
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    spec = describe(str(tmp_path))
    assert not spec.tied_head
    assert spec.num_parameters == sum(parameter.numel() for parameter in model.parameters())


SAMPLE = (
    "smollm2-135m", "gemma3-270m", "gpt2", "t5-small", "flan-t5-small", "mt5-small", "opt-350m", "bloom-560m",
    "pythia-160m", "qwen3-0.6b", "llama-3.2-1b", "olmo-2-0425-1b",
)  # fmt: skip


@pytest.mark.parametrize("alias", SAMPLE)
def test_catalogue_counts_are_those_of_the_built_model(alias: str) -> None:
    """An entry's count is that of the model built from its config, with a head of its own where it was released so."""
    entry = catalogue.entries()[alias]
    facts = dict(entry.config)
    config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    head = 0 if entry.tied_head or not is_tied(model) else model.get_input_embeddings().weight.numel()
    assert model.num_parameters() + head == entry.num_parameters


@pytest.mark.parametrize(("family", "padding"), [("roberta", 1), ("xlm-roberta", 0), ("camembert", 3), ("bert", 0)])
def test_the_longest_row_has_all_positions_but_those_of_padding(family: str, padding: int) -> None:
    """transformers runs a row of `num_positions` tokens; one of a token more finds no position."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 48, "max_position_embeddings": 21}
    config = {"model_type": family, "pad_token_id": padding, **COMMON, **sizes}
    spec = ModelSpec(name=family, kind="directory", config=config, num_parameters=1, tied_head=True)
    model = skeleton(spec, dtype="fp32", attention="sdpa", task="masked-lm")
    assert spec.num_positions is not None
    row = torch.full((1, spec.num_positions), 5)
    assert model(input_ids=row).logits.shape[1] == spec.num_positions
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, spec.num_positions + 1), 5))


def test_a_weight_that_is_read_and_never_called_is_found() -> None:
    """Of Mamba's linear layers one is multiplied by hand; Bloom's are called, and read where a setting wants it."""
    mamba = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 48, "state_size": 4}
    bloom = {"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 48}
    for config, found in ((mamba, ["backbone.layers.0.mixer.dt_proj"]), (bloom, [])):
        spec = ModelSpec(name="m", kind="directory", config=config, num_parameters=1, tied_head=True)
        with torch.device("meta"):
            assert list(read_linears(skeleton(spec, dtype="fp32", attention="eager"))) == found
