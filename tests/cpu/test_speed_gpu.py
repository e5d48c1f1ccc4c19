"""What a rehearsed step asks an accelerator for, and how long device and host take."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from brim.hardware import Device, find
from brim.layers.one_kernel import listening, one_kernel
from brim.memory.fake import FakeWorld
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.rehearsal import rehearse_trace
from brim.speed.communication import communication_s
from brim.speed.gpu import adapter_units, attention_s, block_units, gpu_seconds, host_times, kernels_s, parts_of
from brim.speed.operators import OperatorMeter, StepWork
from brim.speed.roofline import attention_flops

LAYERS, TOKENS, HIDDEN, INNER = 2, 96, 64, 160
SPEC = ModelSpec(
    name="llama",
    kind="directory",
    config={"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 128},
    num_parameters=1,
    tied_head=True,
)  # fmt: skip
RECIPE = Recipe(model="llama", seq_len=TOKENS, micro_batch_size=4).with_settings(
    ["precision.weights=bf16", "precision.compute=bf16"]
)
A100 = find("a100")


def launching_s(work: StepWork) -> float:
    return parts_of(work, SPEC, RECIPE, A100).launching_s(host_times())


def work_of(*settings: str) -> StepWork:
    meter = OperatorMeter()
    rehearse_trace(SPEC, RECIPE.with_settings(settings), device=A100, operators=meter)
    return meter.work


def test_twice_the_rates_halve_what_the_device_takes_and_nothing_of_what_the_host_takes() -> None:
    work = work_of()
    fast = replace(
        A100,
        flops={name: 2 * rate for name, rate in A100.flops.items()},
        bandwidth_bytes_per_s=2 * A100.bandwidth_bytes_per_s,
    )

    def working(device: Device) -> float:
        return kernels_s(work, device) + attention_s(SPEC, RECIPE, device)

    assert working(fast) == pytest.approx(working(A100) / 2)
    assert launching_s(work) > working(A100)  # so small a model
    assert gpu_seconds(work, SPEC, RECIPE, fast) == gpu_seconds(work, SPEC, RECIPE, A100)


def test_a_step_takes_what_the_slower_of_device_and_host_does() -> None:
    """Of a device a thousand times slower the host is not seen."""
    work = work_of()
    slow = replace(
        A100,
        flops={name: rate / 1e3 for name, rate in A100.flops.items()},
        bandwidth_bytes_per_s=A100.bandwidth_bytes_per_s / 1e3,
    )
    expected = kernels_s(work, slow) + attention_s(SPEC, RECIPE, slow)
    assert gpu_seconds(work, SPEC, RECIPE, slow) == pytest.approx(expected)


def test_kernels_hold_the_flops_of_all_products() -> None:
    """And each product's operands and result, so that more bytes are moved than elementwise operators move."""
    work = work_of("method=lora")
    products = sum(work.products.values())
    assert sum(kernel.flops * count for kernel, count in work.kernels.items()) == pytest.approx(products)
    moved = sum(kernel.moved_bytes * count for kernel, count in work.kernels.items() if not kernel.flops)
    assert 0 < moved < sum(kernel.moved_bytes * count for kernel, count in work.kernels.items())


def test_attention_is_counted_by_its_definition() -> None:
    """All scores, three products' worth; half of them under a causal mask, backward two and a half times forward."""
    once = 4 * LAYERS * 4 * 4 * TOKENS**2 * 16
    assert attention_flops(SPEC, RECIPE) == 3 * once
    assert attention_flops(SPEC, RECIPE.with_settings(["memory.attention=eager"])) == 0
    rate = A100.flops["bf16"]
    assert attention_s(SPEC, RECIPE, A100) == pytest.approx(once / 2 * (1 / 0.84 + 2.5 / 0.72) / rate)
    assert attention_s(SPEC, RECIPE, find("h100")) == pytest.approx(once / 2 * 3.5 / 0.44 / find("h100").flops["bf16"])


def test_a_function_of_one_kernel_reads_its_inputs_and_writes_its_results_once() -> None:
    """However many operators it is written in, and what they make in between."""

    def norm(hidden: Tensor) -> Tensor:
        return hidden * (hidden.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt().to(hidden.dtype)

    def moved(function: Callable[[Tensor], Tensor]) -> Counter[int]:
        meter = OperatorMeter()
        with FakeWorld() as world, listening(meter.kernels):
            hidden = torch.empty(8, 1024, dtype=torch.bfloat16)
            world.meter.after = meter
            function(hidden)
        found = Counter[int]()
        for kernel, count in meter.work.kernels.items():
            found[kernel.moved_bytes] += int(count)
        return found

    apart, together = moved(norm), moved(one_kernel(norm))
    assert together == Counter({2 * 8 * 1024 * 2: 1})
    assert sum(apart.values()) == 7 and sum(nbytes * count for nbytes, count in apart.items()) > 4 * 8 * 1024 * 2


def test_fused_kernels_move_less_and_are_fewer() -> None:
    """Norms and gates that libraries fuse: fewer kernels and bytes, the same products."""
    apart, fused = work_of(), work_of("library.norm=fused", "library.activation=fused")

    def of(work: StepWork) -> tuple[float, float, float]:
        kernels = work.kernels.items()
        count = sum(count for kernel, count in kernels if kernel.moved_bytes)
        return count, sum(k.moved_bytes * n for k, n in kernels), sum(k.flops * n for k, n in kernels)

    assert of(fused)[0] < of(apart)[0] and of(fused)[1] < of(apart)[1] and of(fused)[2] == of(apart)[2]


def test_recomputing_to_the_end_adds_each_blocks_last_product() -> None:
    """Reentrant checkpoints make again what the feed-forward gives, which nobody reads."""
    needed = work_of("memory.activation_checkpointing=full")
    whole = work_of("memory.activation_checkpointing=full", "library.checkpoints=reentrant")
    more = sum(whole.products.values()) - sum(needed.products.values())
    assert more == LAYERS * 2 * 4 * TOKENS * INNER * HIDDEN


def test_fsdp_has_a_unit_for_each_block_and_under_fsdp1_for_each_adapters_matrix() -> None:
    sharded = RECIPE.with_settings(["method=lora", "parallel.sharding=zero3", "parallel.devices_per_node=2",
                                    'lora.targets=["q_proj", "v_proj"]'])  # fmt: skip
    fsdp1 = sharded.with_settings(["library.sharding=fsdp1"])
    assert block_units(SPEC, RECIPE) == adapter_units(SPEC, RECIPE) == adapter_units(SPEC, sharded) == 0
    assert block_units(SPEC, sharded) == block_units(SPEC, fsdp1) == LAYERS + 1
    assert adapter_units(SPEC, fsdp1) == LAYERS * 2 * 2
    assert adapter_units(SPEC, fsdp1.with_settings(["library.adapter_units=none"])) == 0
    alone = work_of()
    more = gpu_seconds(alone, SPEC, fsdp1, A100) - gpu_seconds(alone, SPEC, sharded, A100)
    assert more == pytest.approx(LAYERS * 4 * host_times().unit_s)
    talk = communication_s(SPEC, sharded, A100)
    whole = gpu_seconds(alone, SPEC, sharded, A100) - launching_s(alone)
    assert whole == pytest.approx((LAYERS + 1) * host_times().unit_s + talk)
