"""Rehearsing for a GPU that is not here: a published run, what the kernels keep, and the ledger's sum."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from brim.cli import main
from brim.errors import RecipeError
from brim.hardware import Device, find
from brim.memory.constants import context_bytes, cublas_workspace_bytes
from brim.memory.cuda import cuda_kernels
from brim.memory.fake import FakeWorld
from brim.models import describe
from brim.recipe import Recipe
from brim.rehearsal import rehearse, rehearse_trace
from brim.report import Prediction
from brim.units import GIB, MIB

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")


def predicted(recipe: Recipe, device: Device) -> Prediction:
    return rehearse(describe(recipe.model), recipe, device=device, budget_bytes=device.memory_bytes)


LORA = ("method=lora", 'lora.targets=["q_proj","k_proj","v_proj","o_proj"]', "library.adapters=fp32")

FAST = ("library.cross_entropy=in-place", "library.norm=fused", "library.rotary=in-place")
LIKE_4_45 = (
    "library.loss=transformers-4.40",
    "library.autocast=true",
    "library.heads=repeated",
    "library.checkpoints=reentrant",
    "lora.dropout=0.1",
)


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        ((), 72_434_837_504),
        (LORA, 26_704_571_904),
        ((*LORA, "library.cross_entropy=in-place", "library.norm=fused"), 24_473_332_736),
        ((*LORA, *FAST, *LIKE_4_45), 23_530_188_288),
    ],
    ids=["full", "lora", "lora, fast kernels", "lora, fast kernels, transformers 4.45"],
)
def test_a_published_run_is_predicted(settings: tuple[str, ...], published: int) -> None:
    """Mistral-7B on an A100, 4 x 4096, checkpointing: allocated as fms-acceleration@876e2ed6 published it, +-0.01 %."""
    recipe = Recipe(model="mistral-7b-v0.1", seq_len=4096, micro_batch_size=4).with_settings(
        [
            "memory.activation_checkpointing=full",
            "library.adamw=foreach",
            "library.loss=transformers-4.46",
            *settings,
        ]
    )
    spec, device = describe(recipe.model), find("a100")
    # FlashAttention's own package takes a window as a number: no mask
    spec = replace(spec, config={**spec.config, "sliding_window": None})
    peak = rehearse(spec, recipe, device=device, budget_bytes=device.memory_bytes).peak
    assert peak.allocated_bytes == pytest.approx(published, rel=0.0001)


def test_what_a_process_takes_beside_the_allocator_is_the_same_for_any_batch() -> None:
    """nvidia-smi's peaks of one script with 4 and with 8 rows (fms-034 and fms-038 of the published rows) lie the same
    number of MiB above what is reserved here: what is not PyTorch's knows no rows."""
    recipe = Recipe(model="mistral-7b-v0.1", seq_len=4096).with_settings(
        [
            *LORA,
            "lora.dropout=0.1",
            "memory.activation_checkpointing=full",
            "library.adamw=foreach",
            "library.loss=transformers-4.46",
            "library.angles=product",
            "library.checkpoints=reentrant",
        ]
    )
    spec, device = describe(recipe.model), find("a100")
    # a padding token was added; FlashAttention's own package takes a window as a number: no mask
    spec = replace(spec, config={**spec.config, "sliding_window": None, "vocab_size": 32001})
    beside = []
    for rows, shown_mib in ((4, 29_576), (8, 43_232)):
        batched = replace(recipe, micro_batch_size=rows)
        peak = rehearse(spec, batched, device=device, budget_bytes=device.memory_bytes).peak
        assert peak.reserved_bytes is not None
        beside.append(shown_mib - peak.reserved_bytes / MIB)
    assert beside[0] == pytest.approx(beside[1], abs=1)
    assert beside[0] > 0


def test_autocast_is_the_gpus() -> None:
    """On a GPU layer norms, softmax and cross-entropies give FP32 under autocast, and what they are without it."""
    functional = torch.nn.functional
    with FakeWorld() as world, cuda_kernels(find("a100"), world.meter):
        x, weight, labels = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(8), torch.zeros(4, dtype=torch.long)
        calls: list[Callable[[], torch.Tensor]] = [
            lambda: functional.layer_norm(x, (8,), weight.bfloat16()),
            lambda: torch.nn.LayerNorm(8, dtype=torch.bfloat16)(x),
            lambda: functional.softmax(x, dim=-1),
            lambda: functional.log_softmax(x, dim=-1),
            lambda: functional.cross_entropy(x, labels),
        ]
        assert {call().dtype for call in calls} == {torch.bfloat16}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert {call().dtype for call in calls} == {torch.float32}


@pytest.mark.parametrize("name", ["a100", "h100", "rtx-4090", "mi300x"])
def test_the_ledger_adds_up_to_the_devices_peak(name: str) -> None:
    """allocated <= reserved <= device, and every byte of the device's peak is on one line."""
    device = find(name)
    prediction = predicted(Recipe(model="smollm2-135m", seq_len=128), device)
    peak, ledger = prediction.peak, prediction.ledger
    assert peak.reserved_bytes is not None and peak.device_bytes is not None
    assert peak.allocated_bytes <= peak.reserved_bytes < peak.device_bytes
    assert ledger.total == peak.device_bytes
    assert ledger.context == context_bytes(device) == peak.device_bytes - peak.reserved_bytes
    assert ledger.workspace >= 2 * cublas_workspace_bytes(device)


def test_a_processor_is_rehearsed_as_ever() -> None:
    """The same recipe for a CPU: one peak, no context, no fragmentation."""
    recipe, host = Recipe(model="smollm2-135m", seq_len=128), replace(find("a100"), kind="cpu")
    prediction = predicted(recipe, host)
    trace = rehearse_trace(describe(recipe.model), recipe)
    assert prediction.peak.to_dict() == {
        "allocated_bytes": trace.peak_bytes, "reserved_bytes": None, "device_bytes": None
    }  # fmt: skip
    assert prediction.ledger == trace.peak_ledger()


def test_a_smaller_card_reserves_less_than_a_full_one_would() -> None:
    """Where the card is nearly full, unused segments are given back: reserved never passes the card."""
    recipe = Recipe(model="smollm2-135m", seq_len=1024, micro_batch_size=4)
    free = predicted(recipe, find("a100")).peak
    tight = predicted(recipe, find("a100").capped(free.allocated_bytes + GIB)).peak
    assert tight.allocated_bytes == free.allocated_bytes
    assert (tight.reserved_bytes or 0) <= (free.reserved_bytes or 0)


@pytest.mark.parametrize(("kv_heads", "expanded"), [(8, False), (2, True)])
def test_flash_attention_keeps_what_its_source_says(kv_heads: int, expanded: bool) -> None:
    """Forward keeps out and an FP32 log-sum-exp; backward's dq accumulator, row sums and expanded dk, dv pass by."""
    rows, heads, tokens, width = 2, 8, 256, 64
    with FakeWorld() as world, cuda_kernels(find("a100"), world.meter):
        q = torch.empty(rows, heads, tokens, width, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.empty(rows, kv_heads, tokens, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        before = world.meter.trace.live_bytes
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        queries = rows * heads * tokens * width
        assert world.meter.trace.live_bytes - before == 2 * queries + 4 * rows * heads * tokens
        held = world.meter.trace.live_bytes
        gradient = torch.empty_like(out)
        out.backward(gradient)
        keys = rows * kv_heads * tokens * width
        passing = 4 * rows * heads * tokens + 4 * queries + (4 * queries if expanded else 0)
        gradients = 2 * queries + 4 * keys
        assert world.meter.trace.peak_bytes - held == 2 * queries + gradients + passing


@pytest.mark.parametrize(
    ("gpu", "settings", "runs"),
    [("a100", (), True), ("v100", (), False), ("a100", ("precision.weights=fp32", "precision.compute=fp32"), False)],
)
def test_flash_attention_on_a_gpu_wants_16_bits_and_ampere(gpu: str, settings: tuple[str, ...], runs: bool) -> None:
    """Where the device's kernel takes the recipe, its peak is that of `sdpa`; elsewhere `flash` is refused."""
    recipe = Recipe(model="smollm2-135m", seq_len=128).with_settings(settings)
    flash = recipe.with_settings(["memory.attention=flash"])
    if runs:
        assert predicted(flash, find(gpu)).peak == predicted(recipe, find(gpu)).peak
    else:
        with pytest.raises(RecipeError, match="16 bits from Ampere on"):
            predicted(flash, find(gpu))


def test_states_of_8_bits_take_no_temporaries_on_a_gpu() -> None:
    """A GPU's kernel steps a parameter in place: all but the states is as it is under the fused AdamW."""
    recipe = Recipe(model="smollm2-135m", seq_len=16)
    whole = predicted(recipe, find("a100")).ledger
    eight = predicted(recipe.with_settings(["optimizer.name=adamw8bit"]), find("a100")).ledger
    states = 2 * describe(recipe.model).num_parameters
    assert states < eight.optimizer < 1.05 * states
    assert replace(eight, optimizer=0, fragmentation=0) == replace(whole, optimizer=0, fragmentation=0)


@pytest.mark.parametrize("settings", [(), ("precision.master=fp32",)])
def test_what_is_offloaded_is_not_on_the_gpu(settings: tuple[str, ...]) -> None:
    """The device holds no optimizer state, and all else as before; the host holds the states and its own weights."""
    recipe = Recipe(model="smollm2-135m", seq_len=64).with_settings(settings)
    here = predicted(recipe, find("a100"))
    apart = predicted(recipe.with_settings(["memory.offload=optimizer"]), find("a100"))
    assert apart.ledger.optimizer == 0 < here.ledger.optimizer
    assert replace(apart.ledger, fragmentation=0) == replace(here.ledger, optimizer=0, fragmentation=0)
    # what the allocator does not split off a block counts as allocated, and other blocks are reused than before
    assert apart.peak.allocated_bytes < here.peak.allocated_bytes - 0.99 * here.ledger.optimizer
    count = describe(recipe.model).num_parameters
    held = 12 * count if settings else 6 * count
    largest_gradient = 6 * 49152 * 576
    assert here.peak.host_bytes is None
    assert apart.peak.host_bytes is not None
    assert held < apart.peak.host_bytes < 1.01 * held + largest_gradient
    assert apart.peak.to_dict()["host_bytes"] == apart.peak.host_bytes
    assert "host_bytes" not in here.peak.to_dict()
    assert apart.step_time_s > here.step_time_s


@pytest.mark.parametrize("settings", [(), ("memory.activation_checkpointing=full", "memory.loss=chunked")])
def test_of_offloaded_blocks_the_gpu_has_one_at_a_time(settings: tuple[str, ...]) -> None:
    """What blocks keep is on the host but for what is at work; so are their weights, all states and all gradients of
    them, and only tables and the last norm have a second copy there."""
    recipe = Recipe(model="smollm2-135m", seq_len=128, micro_batch_size=2).with_settings(settings)
    kept, both = (
        predicted(recipe.with_settings([f"memory.offload={kind}"]), find("a100")) for kind in ("activations", "all")
    )
    here = predicted(recipe, find("a100"))
    spec = describe(recipe.model)
    tables = 2 * spec.vocab_size * spec.hidden_size
    block = (2 * spec.num_parameters - tables) // spec.num_layers
    tokens = 2 * 128
    boundaries = 2 * tokens * spec.hidden_size * spec.num_layers
    assert kept.peak.host_bytes is not None and both.peak.host_bytes is not None
    assert kept.peak.host_bytes >= boundaries
    assert kept.peak.allocated_bytes <= here.peak.allocated_bytes
    assert tables <= both.ledger.weights < 1.01 * tables
    assert both.ledger.optimizer == 0 and both.ledger.gathered < 2 * block
    widest = 2 * tokens * spec.intermediate_size
    assert both.ledger.activations < (30 if settings else 6) * widest + tables
    # weights of blocks with their gradients, two states of each weight, and the tables' copy with its gradient
    least = 2 * (2 * spec.num_parameters - tables) + 4 * spec.num_parameters + tables
    assert least < both.peak.host_bytes < 1.02 * (least + tables) + kept.peak.host_bytes
    assert both.step_time_s > kept.step_time_s > here.step_time_s


def test_the_command_line_names_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """`brim predict --gpu` prints the three peaks of a GPU that is not here; a typo ends with code 2 and near names."""
    assert main(["predict", "smollm2-135m", "--gpu", "rtx 4090", "--seq-len", "64", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["device"]["name"] == find("4090").name
    assert sum(printed["ledger"].values()) == printed["peak"]["device_bytes"]
    assert printed["error_band"][0] <= 0 < printed["error_band"][1]
    assert main(["predict", "smollm2-135m", "--gpu", "rtx 4900"]) == 2
    assert "4090" in capsys.readouterr().err


def test_a_cap_below_the_upper_bound_does_not_fit() -> None:
    """`fits` asks for the upper bound of the device's peak, not for the peak itself."""
    recipe, device = Recipe(model="smollm2-135m", seq_len=128), find("a100")
    peak = predicted(recipe, device).peak.highest_bytes
    spec = describe(recipe.model)
    assert not rehearse(spec, recipe, device=device, budget_bytes=peak).fits
    assert rehearse(spec, recipe, device=device, budget_bytes=2 * peak).fits
