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

from brim.hardware import Device
from brim.memory import kept
from brim.memory.anatomy import anatomy
from brim.memory.rough import closed_form_knows
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.speed.communication import communication_s, talking
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
_PYTHON_S, _ENGINE_S = 60e-6, 50e-6
"""Host's seconds for an operator that Python asks for (module calls, hooks, recording), and the autograd engine."""
UNIT_S = 4e-3
"""Seconds for a unit of FSDP in a micro-batch: its hooks, gathers, copies and reduction. For blocks the device waits:
the host may not gather further ahead than one unit (torch/distributed/fsdp, `limit_all_gathers`). The small units of
adapters pass while it works."""


def gpu_seconds(work: StepWork, spec: ModelSpec, recipe: Recipe, device: Device) -> float:
    """Of an optimizer step. What is offloaded is the host's work, and is added by the closed form."""
    working = kernels_s(work, device) + attention_s(spec, recipe, device)
    busy = max(working, launching_s(work, spec, recipe)) + offloaded_s(spec, recipe)
    if not block_units(spec, recipe):
        return talking(spec, recipe, device, busy)
    busy += recipe.grad_accumulation * block_units(spec, recipe) * UNIT_S
    if recipe.parallel.nodes > 1:
        return talking(spec, recipe, device, busy)
    return busy + communication_s(spec, recipe, device)


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


def launching_s(work: StepWork, spec: ModelSpec, recipe: Recipe) -> float:
    """The host's seconds for asking for everything; views take a small part of an operator's, and are left out."""
    asked = {"python": _PYTHON_S, "autograd": _ENGINE_S}
    operators = sum(count * asked[kernel.launcher] for kernel, count in work.kernels.items() if kernel.moved_bytes)
    return operators + recipe.grad_accumulation * adapter_units(spec, recipe) * UNIT_S


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
