"""Bytes by module: conserved, and where a model's own parameters say they are."""

import json
from collections import Counter

import pytest

from brim.cli import main
from brim.cli.modules import show
from brim.hardware import Device, find
from brim.models import ModelSpec
from brim.models.skeleton import skeleton
from brim.recipe import Recipe
from brim.rehearsal import rehearse, rehearse_modules
from brim.report import LEDGER_LINES
from brim.units import GIB

_LAYERS = 3
_CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4, "vocab_size": 600, "max_position_embeddings": 128,
}  # fmt: skip
SPEC = ModelSpec(name="small", kind="directory", config=_CONFIG, num_parameters=1, tied_head=False)
CPU = Device(
    name="cpu", kind="cpu", memory_bytes=GIB, memory_free_bytes=GIB, flops={"fp32": 1e10, "bf16": 1e10},
    bandwidth_bytes_per_s=1e10, cores=2,
)  # fmt: skip
RECIPE = Recipe(model="small", seq_len=64, micro_batch_size=4)
FP32 = ("precision.weights=fp32", "precision.compute=fp32")


@pytest.mark.parametrize("device", [CPU, find("rtx-4090")], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    "chosen",
    [
        (),
        ("memory.activation_checkpointing=full", "memory.loss=chunked", "grad_accumulation=2"),
        ("memory.activation_checkpointing=selective", "precision.master=fp32"),
        ("method=lora", *FP32),
        ("method=qlora", "precision.weights=nf4"),
        ("optimizer.in_backward=true", "optimizer.max_grad_norm=0.0", "optimizer.name=adamw8bit"),
        ("parallel.devices_per_node=2", "parallel.sharding=zero3"),
    ],
    ids=" ".join,
)
def test_the_rows_add_up_to_the_ledger(chosen: tuple[str, ...], device: Device) -> None:
    """On each line the modules together hold what the ledger of the unwatched rehearsal says; no row is negative."""
    recipe = RECIPE.with_settings(chosen)
    ledger = rehearse(SPEC, recipe, device=device, budget_bytes=GIB).ledger.to_dict()
    rows = rehearse_modules(SPEC, recipe, device=device)
    assert {line: sum(getattr(row.ledger, line) for row in rows) for line in LEDGER_LINES} == ledger
    assert all(nbytes >= 0 for row in rows for nbytes in row.ledger.to_dict().values())
    assert [row.ledger.total for row in rows] == sorted((row.ledger.total for row in rows), reverse=True)


def test_a_module_holds_its_parameters_gradients_and_states() -> None:
    """When a short batch's optimizer step is the peak, each module has its parameters once as weights, once as
    gradients and twice as AdamW's moments (and a step count each), as the model itself counts them."""
    recipe = RECIPE.with_settings(("seq_len=2", "micro_batch_size=1", "optimizer.max_grad_norm=0.0", *FP32))
    held = {row.module: row for row in rehearse_modules(SPEC, recipe, device=CPU)}
    assert held["model.layers.0-2.mlp.down_proj"].count == _LAYERS
    counted: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for name, parameter in skeleton(SPEC, dtype="fp32", attention="sdpa").named_parameters():
        folded = ".".join("0-2" if part.isdigit() else part for part in name.split(".")[:-1])
        counted[folded] += 4 * parameter.numel()
        parameters[folded] += 1
    for module, nbytes in counted.items():
        ledger = held[module].ledger
        assert (ledger.weights, ledger.gradients) == (nbytes, nbytes)
        assert ledger.optimizer == 2 * nbytes + 4 * parameters[module]


def test_kept_activations_are_in_the_modules_that_made_them() -> None:
    """At the loss each of a layer's linears still holds what it gave: tokens x outputs."""
    recipe = RECIPE.with_settings(("method=lora", *FP32))
    held = {row.module: row.ledger for row in rehearse_modules(SPEC, recipe, device=CPU)}
    tokens, width, rank = 4 * 64, 160, recipe.lora.rank
    for name in ("gate_proj", "up_proj"):
        assert held[f"model.layers.0-2.mlp.{name}"].activations == _LAYERS * 4 * tokens * width
        assert held[f"model.layers.0-2.mlp.{name}.lora_A.default"].activations == _LAYERS * 4 * tokens * rank


def test_the_command_prints_what_it_gives_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Whole names, whatever the terminal's width; in JSON the rows that add up to the ledger beside them."""
    show(rehearse_modules(SPEC, RECIPE, device=CPU))
    assert "model.layers.0-2.self_attn.q_proj x3\n" in capsys.readouterr().out
    question = ["predict", "smollm2-135m", "--seq-len", "16", "--modules"]
    assert main([*question, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(sum(row["ledger"].values()) for row in told["modules"]) == sum(told["ledger"].values())
    assert main([*question, "--quick"]) == 2
