"""How long an accelerator takes for a rehearsed step. Nothing was measured on it: rates are published ones.

The device works through its queue of kernels while the host fills it, so a step takes what the slower of the two does.

The device: a product takes its FLOPs at the best published rate of products and, before and after, its operands and
its result at the memory's rate (a tile's first loads and its epilogue have no products beside them, and MAMF's best
shapes hide them in longer ones); all else takes its bytes. The host: Python and the autograd engine take their time
for each operator, FSDP for each unit that it gathers and reduces. What it moves within a node is added: the devices'
own cores copy it, in turns with their work (stas00/ml-engineering, training performance: overlap is partial, and a
forecast of 18 s of work and 11 s of talk took 49). Between nodes adapters move it, beside the work.

How long the host takes was learned from published steps (docs/throughput.md says
how wrong they are for a source that was left out); no device's rate was.

Ignored: products too small to fill the device (there the host rules), dropout's random numbers, and waiting for data.
"""

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import get_args

from brim.hardware import Device
from brim.memory import kept
from brim.memory.anatomy import anatomy
from brim.memory.rough import closed_form_knows
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.speed.communication import communication_s, talking
from brim.speed.kernels import Launcher
from brim.speed.operators import StepWork
from brim.speed.roofline import attention_flops, offloaded_s

REACHED_BANDWIDTH = 0.88
"""Of the maker's bytes/s: 1.80 of 2.04 TB/s on an A100, where the best known kernels reach about 0.9 (NVIDIA developer
forum, topic 339083, "Trouble to reach peak bandwidth of A100")."""
_FLASH, _FLASH_BACKWARD = 0.84, 0.72
"""FlashAttention-2's rate by the best rate of products: at most 73 % and 63 % of an A100's 312 TFLOP/s forward and
backward (arXiv:2307.08691, section 4.1), where products reach 271."""
_FLASH_HOPPER = 0.44
"""FlashAttention-2 uses 35 % of an H100's 989 TFLOP/s (arXiv:2407.08608, abstract), where products reach 794."""
_HOPPER = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTimes:
    """Seconds that the host takes, learned from published steps (data/host_times.csv)."""

    python_s: float
    """For an operator that Python asks for: module calls, hooks, recording it for backward."""
    engine_s: float
    """For one that the autograd engine asks for."""
    unit_s: float
    """For a unit of FSDP in a micro-batch: its hooks, gathers, copies and reduction. For blocks the device waits: the
    host may not gather further ahead than one unit (torch/distributed/fsdp, `limit_all_gathers`). The small units of
    adapters pass while it works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an optimizer step's time is made of."""

    working_s: float
    """The device's."""
    python_operators: float
    engine_operators: float
    adapter_units: int
    """Of all micro-batches, as are a block's."""
    block_units: int
    asks_device: bool = False
    """Python waits for numbers from the device again and again, so that it never runs ahead of it."""

    def launching_s(self, host: HostTimes) -> float:
        """The host's, for asking for everything. Views take a small part of an operator's time, and are left out."""
        operators = self.python_operators * host.python_s + self.engine_operators * host.engine_s
        return operators + self.adapter_units * host.unit_s

    def busy_s(self, host: HostTimes) -> float:
        """Of one device, communication aside."""
        in_turn_s = self.python_operators * host.python_s if self.asks_device else 0.0
        return max(self.working_s + in_turn_s, self.launching_s(host)) + self.block_units * host.unit_s


@cache
def host_times() -> HostTimes:
    """Those that data/host_times.csv holds."""
    text = resources.files("brim.speed").joinpath("data", "host_times.csv").read_text(encoding="utf-8")
    return HostTimes(**{row["name"]: float(row["seconds"]) for row in csv.DictReader(text.splitlines())})


def gpu_seconds(
    work: StepWork, spec: ModelSpec, recipe: Recipe, device: Device, *, host: HostTimes | None = None
) -> float:
    """Of an optimizer step. What is offloaded is the host's work, and is added by the closed form."""
    parts = parts_of(work, spec, recipe, device)
    busy_s = parts.busy_s(host or host_times()) + offloaded_s(spec, recipe)
    return with_talk(busy_s, spec, recipe, device)


def with_talk(busy_s: float, spec: ModelSpec, recipe: Recipe, device: Device) -> float:
    """Within a node the devices' own cores copy what FSDP moves, in turns with their work; between nodes, adapters."""
    if block_units(spec, recipe) and recipe.parallel.nodes == 1:
        return busy_s + communication_s(spec, recipe, device)
    return talking(spec, recipe, device, busy_s)


def parts_of(work: StepWork, spec: ModelSpec, recipe: Recipe, device: Device) -> Parts:
    asked = dict.fromkeys(get_args(Launcher), 0.0)
    for kernel, count in work.kernels.items():
        if kernel.moved_bytes or kernel.launcher == "host":
            asked[kernel.launcher] += count
    return Parts(
        working_s=kernels_s(work, device) + attention_s(spec, recipe, device),
        python_operators=asked["python"] + asked["host"],
        engine_operators=asked["autograd"],
        adapter_units=recipe.grad_accumulation * adapter_units(spec, recipe),
        block_units=recipe.grad_accumulation * block_units(spec, recipe),
        asks_device=_asks_device(spec, recipe),
    )


def _asks_device(spec: ModelSpec, recipe: Recipe) -> bool:
    """Packed experts are gone through one by one, each asking which tokens it got (layers/packed_experts.py, `routes`).

    Of families with a row; others' are taken for plain feed-forwards.
    """
    if not (recipe.precision.packed and closed_form_knows(spec, recipe)):
        return False
    return any(stack.block.feed_forward.num_experts > 1 for stack in anatomy(spec).stacks)


def kernels_s(work: StepWork, device: Device) -> float:
    """The device's seconds for all but fused attention."""
    bytes_per_s = REACHED_BANDWIDTH * device.bandwidth_bytes_per_s
    return sum(
        count * (kernel.flops / device.flops[kernel.number_format] + kernel.moved_bytes / bytes_per_s)
        for kernel, count in work.kernels.items()
    )


def attention_s(spec: ModelSpec, recipe: Recipe, device: Device) -> float:
    """Of fused attention, whose products hide in a kernel: by the closed form, half the scores under a causal mask.

    Backward has five products for forward's two: it makes the scores again (arXiv:2307.08691, section 3.1.2).
    """
    passes = 3 + (recipe.memory.activation_checkpointing != "none")
    forward = attention_flops(spec, recipe) / passes * (0.5 if recipe.task == "causal-lm" else 1.0)
    rate = device.flops["bf16" if recipe.precision.compute != "fp32" else "fp32"]
    if device.compute_major == _HOPPER:
        return forward * (passes - 2 + 2.5) / (_FLASH_HOPPER * rate)
    return forward * (passes - 2) / (_FLASH * rate) + forward * 2.5 / (_FLASH_BACKWARD * rate)


def block_units(spec: ModelSpec, recipe: Recipe) -> int:
    """Of FSDP: each block, and what is beside them; 0 where weights are not divided."""
    divided = recipe.parallel.divides_weights and recipe.parallel.data_ranks > 1
    return spec.num_layers + 1 if divided else 0


def adapter_units(spec: ModelSpec, recipe: Recipe) -> int:
    """Under FSDP1 each of an adapter's two matrices is a unit, too, unless adapters are left out of it."""
    library = recipe.library
    own = recipe.adapts and library.sharding == "fsdp1" and library.adapter_units == "own"
    return 2 * _adapted_matrices(spec, recipe) if own and block_units(spec, recipe) else 0


def _adapted_matrices(spec: ModelSpec, recipe: Recipe) -> int:
    """By the names alone for a family without a row."""
    if not closed_form_knows(spec, recipe):
        return spec.num_layers * len(recipe.lora.targets)
    t = kept.terms(anatomy(spec), recipe)
    return sum(stack.num_blocks * sum(map(t.adapts, stack.block.linears)) for stack in t.parts.stacks)
