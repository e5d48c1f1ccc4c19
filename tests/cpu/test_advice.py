"""Advice by rehearsal: the savings are those of recipes rehearsed apart."""

from brim.hardware import Device
from brim.models import ModelSpec
from brim.planning import advise
from brim.recipe import Recipe
from brim.rehearsal import rehearse, rehearse_trace
from brim.report import Prediction
from brim.units import GIB

_CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 600, "max_position_embeddings": 128,
}  # fmt: skip
SPEC = ModelSpec(name="small", kind="directory", config=_CONFIG, num_parameters=1, tied_head=False)
DEVICE = Device(
    name="cpu", kind="cpu", memory_bytes=GIB, memory_free_bytes=GIB, flops={"fp32": 1e10, "bf16": 1e10},
    bandwidth_bytes_per_s=1e10, cores=2,
)  # fmt: skip


def test_savings_are_those_of_recipes_rehearsed_apart() -> None:
    """Peak before less peak after, each the highest moment of a trace that was made for it alone."""
    recipe = Recipe(model="small", seq_len=64, micro_batch_size=4)

    def predict(changed: Recipe) -> Prediction:
        return rehearse(SPEC, changed, device=DEVICE, budget_bytes=GIB)

    found = advise(SPEC, recipe, predict(recipe), device=DEVICE, predict=predict)
    before = rehearse_trace(SPEC, recipe).peak_bytes
    for advice in found:
        after = rehearse_trace(SPEC, recipe.with_settings(advice.settings)).peak_bytes
        assert advice.saved_bytes == before - after > 0
    assert {"method=lora", "micro_batch_size=2", "seq_len=32"} <= {setting for a in found for setting in a.settings}
    assert not any("sharding" in setting for a in found for setting in a.settings)
