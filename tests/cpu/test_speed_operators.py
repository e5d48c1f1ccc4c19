"""A step's operators as the rehearsal counts them, and this machine's check-up."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from brim import cli
from brim.hardware.calibrate import operator_rates
from brim.hardware.operator_rates import KEYS, OperatorRates
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.rehearsal import rehearse_trace
from brim.speed.operators import OperatorMeter, StepWork
from brim.training.batches import synthetic_batch
from brim.training.build import build
from brim.training.step import train_step

CONFIGS = {
    "llama": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 512},
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 512,
           "is_encoder_decoder": True, "decoder_start_token_id": 0},
}  # fmt: skip


def spec_of(family: str) -> ModelSpec:
    config = {"model_type": family, **CONFIGS[family]}
    return ModelSpec(name=family, kind="directory", config=config, num_parameters=1, tied_head=True)


def recipe_of(family: str, *settings: str) -> Recipe:
    task = "seq2seq-lm" if family == "t5" else "causal-lm"
    recipe = Recipe(model=family, task=task, seq_len=96, micro_batch_size=4)  # type: ignore[arg-type]
    return recipe.with_settings(["precision.weights=fp32", "precision.compute=fp32", *settings])


def work_of(family: str, *settings: str) -> StepWork:
    meter = OperatorMeter()
    rehearse_trace(spec_of(family), recipe_of(family, *settings), operators=meter)
    return meter.work


def flops(work: StepWork) -> float:
    return sum(work.products.values()) + sum(work.attention.values())


LEVERS = [(), ("memory.activation_checkpointing=full",), ("method=lora",), ("grad_accumulation=3",)]


@pytest.mark.parametrize("settings", LEVERS, ids=lambda settings: settings[0] if settings else "plain")
@pytest.mark.parametrize("family", CONFIGS)
def test_counted_flops_are_those_of_a_real_step(family: str, settings: tuple[str, ...]) -> None:
    """PyTorch's own counter, over the step run for real, finds as many as the rehearsal did."""
    spec, recipe = spec_of(family), recipe_of(family, *settings)
    workload = build(recipe, spec)
    batches = [synthetic_batch(recipe, spec, seed=index) for index in range(recipe.grad_accumulation)]
    with FlopCounterMode(display=False) as counter:
        train_step(workload, batches, learning_rate=1e-4)
    work = work_of(family, *settings)
    # torch's counter has no row for the processor's attention kernel: its products are what ours counts beside
    assert sum(work.products.values()) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_attention_is_counted_by_its_definition() -> None:
    """Forward two products over all scores, backward five: 4 and 10 x rows x heads x tokens^2 x width."""
    work = work_of("llama")
    once = 2 * 4 * 4 * 96 * 96 * 16  # layers, rows, heads, tokens, tokens, width
    assert work.attention == {
        ("attention", "fp32", 96): 4 * once,
        ("attention-backward", "fp32", 96): 10 * once,
    }


def test_time_follows_rates_and_work() -> None:
    """Twice the rates and half the dispatch halve the time; recomputing and accumulating add to it."""
    slow = OperatorRates(rates=dict.fromkeys(KEYS, 1e9), overhead_s=2e-6)
    fast = replace(slow, rates=dict.fromkeys(KEYS, 2e9), overhead_s=1e-6)
    work = work_of("llama")
    assert work.seconds(fast) == pytest.approx(work.seconds(slow) / 2)
    assert work_of("llama", "memory.activation_checkpointing=full").seconds(slow) > work.seconds(slow)
    three = work_of("llama", "grad_accumulation=3").seconds(slow)
    assert 2 * work.seconds(slow) < three < 3 * work.seconds(slow)  # one optimizer step for three


def test_the_optimizer_moves_every_weight_and_state() -> None:
    """AdamW reads weight, gradient and two moments and writes three of them: seven times the parameters, and more."""
    spec, recipe = spec_of("llama"), recipe_of("llama")
    parameters = sum(p.numel() for p in build(recipe, spec).model.parameters())
    with_it = sum(work_of("llama").passes.values())
    plain = work_of("llama", "optimizer.name=sgd", "optimizer.max_grad_norm=0")
    assert with_it > 7 * 4 * parameters
    assert sum(plain.passes.values()) != with_it


def test_calibration_times_every_kind() -> None:
    """Each rate is there and positive, and they survive their file. How high they are is the machine's affair."""
    found = operator_rates(seconds_each=0.0)
    assert set(found.rates) == set(KEYS)
    assert OperatorRates.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert 0 < found.overhead_s < 1


def test_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    """The processor with its memory free now, the disk, the versions that are installed."""
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    processor = found["devices"][0]
    assert processor["kind"] == "cpu"
    assert 0 < processor["memory_free_bytes"] <= processor["memory_bytes"]
    assert found["libraries"]["torch"] == torch.__version__
    assert all(0 <= disk["free_bytes"] <= disk["total_bytes"] for disk in found["disks"])
    assert bool(found["no_gpu_because"]) is (len(found["devices"]) == 1)
    assert cli.main(["doctor"]) == 0
    assert "free now" in capsys.readouterr().out


def test_doctor_shows_a_device_of_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    """Any alias names the row; a typo names the nearest; two questions at once are refused."""
    assert cli.main(["doctor", "--gpu", "A100-80GB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accelerator"]["name"] == "A100 SXM4 80GB"
    assert cli.main(["doctor", "--gpu", "h1000"]) == 2
    assert "did you mean h100" in capsys.readouterr().err
    assert cli.main(["doctor", "--gpu", "h100", "--calibrate"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_a_run_costs_hours_and_what_an_hour_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten times the tokens take ten times the hours, price and energy; the share of the peak stays and is below one."""
    costs = []
    for tokens in ("10M", "100M"):
        arguments = ["predict", "smollm2-135m", "--gpu", "h100", "--quick", "--tokens", tokens, "--json"]
        assert cli.main(arguments) == 0
        costs.append(json.loads(capsys.readouterr().out))
    small, large = (found["cost"] for found in costs)
    for key in ("hours", "price_usd", "energy_kwh"):
        assert large[key] == pytest.approx(10 * small[key])
    assert 0 < small["utilization"] == large["utilization"] < 1
    assert large["hours"] == pytest.approx(1e8 / costs[0]["tokens_per_s"] / 3600)
    assert cli.main(["predict", "smollm2-135m", "--gpu", "h100", "--quick", "--tokens", "few"]) == 2
    assert "--tokens 'few'" in capsys.readouterr().err
