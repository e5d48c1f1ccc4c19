"""The parts of a run that may surprise, each rehearsed and each measured in a real run of the same recipe."""

from dataclasses import replace
from pathlib import Path

import pytest

from brim.cli import main
from brim.hardware.measure import resolve_device
from brim.memory.trace import Trace
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.rehearsal import rehearse, rehearse_trace
from brim.report import Prediction
from brim.training.trial import measured_moments

CONFIGS = {
    "llama": {
        "model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1500, "max_position_embeddings": 256,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 96, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": 1500},
    "t5": {
        "model_type": "t5", "d_model": 96, "d_ff": 256, "d_kv": 24, "num_heads": 4, "num_layers": 2,
        "vocab_size": 1500, "is_encoder_decoder": True, "decoder_start_token_id": 0, "pad_token_id": 0,
    },
}  # fmt: skip
CASES = {
    "llama, full": ("llama", ("precision.weights=fp32", "precision.compute=fp32", "memory.loss=chunked")),
    "gpt2, adapters over masters": ("gpt2", ("method=lora", "precision.master=fp32")),
    "t5, nf4": ("t5", ("method=qlora", "precision.weights=nf4")),
    "llama, checkpointed, 8 bits": ("llama", ("memory.activation_checkpointing=full", "optimizer.name=adamw8bit")),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]


def small(name: str) -> ModelSpec:
    return ModelSpec(name=name, kind="directory", config=CONFIGS[name], num_parameters=1, tied_head=True)


@pytest.mark.parametrize("name", CASES)
def test_each_moment_peaks_as_rehearsed(name: str, tmp_path: Path) -> None:
    """Loading, first step, later steps, evaluation, checkpoint, merging: each within 0.1 % of the real one's peak.

    While weights are read, the allocation events have the mapped file besides, and no more. Publishing a whole model
    takes nothing beyond what a checkpoint takes.
    """
    family, settings = CASES[name]
    spec = small(family)
    recipe = Recipe(model=family, task=spec.task, seq_len=64, micro_batch_size=2).with_settings(settings)
    peaks, highest = measured_moments(spec, recipe, tmp_path)
    rehearsed = dict(rehearse_trace(spec, recipe, whole_run=True).moment_peaks())
    assert list(rehearsed) == ["loading", "first step", "later steps", "evaluation", "saving"] + (
        ["merging"] if recipe.adapts else []
    )
    for moment, nbytes in rehearsed.items():
        assert nbytes == pytest.approx(peaks[moment], rel=0.001), moment
    assert highest <= 1.001 * rehearsed["loading"] + (tmp_path / "model" / "model.safetensors").stat().st_size
    if not recipe.adapts:
        assert peaks["publishing"] <= peaks["saving"]


def test_the_peak_is_the_highest_moment() -> None:
    """Moments and peak are of one trace; a prediction keeps them when it is kept, and so does the JSON."""
    spec, device = small("llama"), resolve_device("cpu", None)
    recipe = Recipe(model="llama", seq_len=64, micro_batch_size=2)
    found = rehearse(spec, recipe, device=device, budget_bytes=2**34)
    assert max(moment.allocated_bytes for moment in found.moments) == found.peak.allocated_bytes
    assert found.to_dict()["moments"][0] == {"name": "loading", "allocated_bytes": found.moments[0].allocated_bytes}
    assert Prediction.from_dict(found.to_dict()) == replace(found, recipe=found.to_dict()["recipe"])


def test_the_table_has_the_moments(capsys: pytest.CaptureFixture[str]) -> None:
    """`brim predict` shows each moment, on a GPU that is not here, too."""
    assert main(["predict", "smollm2-135m", "--gpu", "a100", "--seq-len", "32", "--method", "lora"]) == 0
    shown = capsys.readouterr().out
    for moment in ("loading", "first step", "later steps", "evaluation", "saving", "merging"):
        assert f"in {moment}" in shown


def test_a_moment_begins_with_what_lives() -> None:
    """Of each stretch of events the highest sum counts, with what was there before it."""
    trace = Trace()
    first = trace.allocate(10, "weights")
    trace.begin("one")
    trace.free(trace.allocate(5, "workspace"))
    trace.begin("nothing")
    trace.begin("two")
    trace.free(first)
    trace.allocate(3, "loss")
    assert trace.moment_peaks() == [("one", 15), ("nothing", 10), ("two", 10)]
