"""qlora of a mixture: its experts are packed from the file, rehearsed as they run, and the rest learns beside them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from brim.layers.packed_experts import DOWN, GATE_UP, PackedExperts
from brim.layers.packing import held_bytes
from brim.models import ModelSpec, describe
from brim.models.skeleton import DTYPES
from brim.recipe import Lora, Memory, Precision, Recipe
from brim.rehearsal import rehearse_trace
from brim.training.adapters import save_adapter
from brim.training.batches import synthetic_batch
from brim.training.build import Workload, build
from brim.training.packed_base import packing_of
from brim.training.step import train_step
from brim.training.trial import measured_trial

HIDDEN, INTERMEDIATE, EXPERTS = 64, 192, 4
_SHAPE: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "num_experts_per_tok": 2,
    "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**_SHAPE, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_SHAPE, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS),
    "gpt_oss": lambda: GptOssConfig(**_SHAPE, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS),
}
NF4 = Precision(weights="nf4", compute="fp32")
INT4 = Precision(weights="int4", compute="fp32", group_size=32)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
Directory = Callable[[str], Path]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    """Family -> a random mixture of it, in files."""

    def make(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"mixture-{family}"
        if not path.exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[family]()).save_pretrained(path)
        return path

    return make


def recipe_for(path: Path, **settings: Any) -> Recipe:
    recipe = Recipe(model=str(path), method="qlora", seq_len=64, micro_batch_size=4, precision=NF4, lora=Lora(rank=4))
    return replace(recipe, **settings)


def workload_of(recipe: Recipe) -> Workload:
    return build(recipe, describe(recipe.model), weights=Path(recipe.model))


def packed_experts(workload: Workload) -> dict[str, PackedExperts]:
    return {name: module for name, module in workload.base.named_modules() if isinstance(module, PackedExperts)}


def evenly(tokens: int, places: int) -> Tensor:
    """The experts of each token, every expert asked by as many."""
    return torch.arange(tokens * places).view(tokens, places) % EXPERTS


def routed(workload: Workload, route: Callable[[int, int], Tensor]) -> None:
    """From now on the router sends tokens where `route` says, with the weights it gave."""

    def overwrite(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[1].data.copy_(route(*inputs[1].shape))  # in place: another tensor would count

    for experts in packed_experts(workload).values():
        experts.register_forward_pre_hook(overwrite)


def measured_bytes(recipe: Recipe, spec: ModelSpec, route: Callable[[int, int], Tensor]) -> int:
    """The peak of two real steps under this routing."""
    trial = measured_trial(spec, recipe, prepare=lambda workload: routed(workload, route))
    return trial.peak.allocated_bytes


@pytest.mark.parametrize("precision", [NF4, INT4], ids=["nf4", "int4"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_each_expert_is_packed_from_its_weight_in_the_file(
    family: str, precision: Precision, directory: Directory
) -> None:
    """Codes and scales of every expert's gate, up and down are those of the file's weight, and nothing is lost."""
    recipe = recipe_for(directory(family), precision=precision)
    workload, packing = workload_of(recipe), packing_of(precision)
    source = AutoModelForCausalLM.from_pretrained(recipe.model)
    found = packed_experts(workload)
    assert len(found) == 2
    for name, experts in found.items():
        plain = source.get_submodule(name)
        for expert in range(EXPERTS):
            gate, up = plain.gate_up_proj[expert].detach().chunk(2)
            down = plain.down_proj[expert].detach()
            for parameter, matrix, weight in ((GATE_UP, 0, gate), (GATE_UP, 1, up), (DOWN, 0, down)):
                expected, held = packing.pack(weight.contiguous()), experts.matrix(parameter, expert, matrix).held
                assert all(torch.equal(held[key], expected[key]) for key in expected)


def test_loading_merges_no_experts(directory: Directory) -> None:
    """A file's experts are packed one by one: loading never stacks them as transformers does."""
    merge = "transformers.core_model_loading.MergeModulelist.convert"
    with mock.patch(merge, side_effect=AssertionError("merged")):
        workload = workload_of(recipe_for(directory("mixtral")))
    assert packed_experts(workload)


def test_loaded_and_random_bases_hold_the_same_tensors(directory: Directory) -> None:
    """What is rehearsed on random weights is what is loaded; and all of it is what the packing counts."""
    recipe = recipe_for(directory("mixtral"))
    loaded, random = (
        {
            name: (tensor.shape, tensor.dtype)
            for name, tensor in [*workload.model.named_parameters(), *workload.model.named_buffers()]
        }
        for workload in (workload_of(recipe), build(recipe, describe(recipe.model)))
    )
    assert loaded == random
    packing, dtype = packing_of(NF4), DTYPES["fp32"]
    one_expert = 3 * held_bytes(packing, INTERMEDIATE, HIDDEN, dtype)
    for experts in packed_experts(workload_of(recipe)).values():
        assert sum(buffer.nbytes for buffer in experts.buffers()) == EXPERTS * one_expert


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapters_learn_beside_packed_experts(family: str, directory: Directory, tmp_path: Path) -> None:
    """The loss falls, no expert has an adapter or moves, and PEFT loads the adapter beside plain experts."""
    recipe = recipe_for(directory(family))
    workload, spec = workload_of(recipe), describe(recipe.model)
    before = {name: tensor.clone() for name, tensor in workload.model.named_buffers()}
    batch = synthetic_batch(recipe, spec)
    losses = [float(train_step(workload, [batch], learning_rate=1e-2)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert workload.trainable
    assert not any("experts" in name for name in workload.trainable)
    assert all(torch.equal(tensor, before[name]) for name, tensor in workload.model.named_buffers())
    assert isinstance(workload.model, PeftModel)
    save_adapter(workload.model, spec, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert not {GATE_UP, DOWN} & set(saved["target_parameters"] or ())
    base: nn.Module = AutoModelForCausalLM.from_pretrained(recipe.model)
    loaded = dict(PeftModel.from_pretrained(base, str(tmp_path)).named_parameters())
    for name, parameter in workload.trainable.items():
        assert torch.equal(loaded[name], parameter), name


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("precision", [NF4, INT4], ids=["nf4", "int4"])
def test_an_even_routing_is_rehearsed_to_the_byte(
    precision: Precision, checkpointing: Any, directory: Directory
) -> None:
    """Where every expert gets as many tokens, the rehearsal's peak is the real step's, within 0.1 %."""
    memory = Memory(activation_checkpointing=checkpointing, loss="chunked")
    recipe = recipe_for(directory("mixtral"), precision=precision, memory=memory)
    spec = describe(recipe.model)
    rehearsed = rehearse_trace(spec, recipe).peak_bytes
    assert rehearsed == pytest.approx(measured_bytes(recipe, spec, evenly), rel=0.001)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_lopsided_routing_adds_what_its_longest_queue_adds(checkpointing: Any, directory: Directory) -> None:
    """With all tokens at the same experts, the peak passes the rehearsal's by at most those experts' surplus of tokens
    times two rows of I and one of H (docs/decisions.md), and without checkpointing by nothing."""
    recipe = recipe_for(directory("mixtral"), memory=Memory(activation_checkpointing=checkpointing, loss="chunked"))
    spec = describe(recipe.model)
    rehearsed = rehearse_trace(spec, recipe).peak_bytes
    measured = measured_bytes(recipe, spec, lambda tokens, places: torch.arange(places).repeat(tokens, 1))
    tokens = recipe.micro_batch_size * recipe.seq_len
    surplus = tokens - tokens * 2 // EXPERTS
    bound = surplus * (2 * INTERMEDIATE + HIDDEN) * 4 if checkpointing == "full" else 0
    assert -0.001 * rehearsed <= measured - rehearsed <= bound + 0.001 * rehearsed


def test_experts_of_another_layout_stay_and_are_named(directory: Directory) -> None:
    """gpt-oss, whose experts are transposed and have biases: a warning names them, and they keep their weights."""
    recipe = recipe_for(directory("gpt_oss"), memory=Memory(attention="eager"))
    with pytest.warns(UserWarning, match="experts of GptOssExperts are laid out in a way that is not packed"):
        workload = build(recipe, describe(recipe.model))
    assert not packed_experts(workload)
    assert any(name.endswith(GATE_UP) and p.is_floating_point() for name, p in workload.model.named_parameters())
