"""What pipeline stages would hold and how long they would idle, by closed form: advice, since this version builds none.

Each stage has some of the blocks, and works on one micro-batch while the others work on others; in the order 1F1B a
stage keeps at most as many micro-batches as there are stages (Narayanan et al., "Efficient large-scale language model
training on GPU clusters using Megatron-LM", 2021, section 2.2). Each stage is counted with embedding and head, which
only the first and the last have. Ignored: what stages send each other, a block's input for each micro-batch.
"""

from dataclasses import dataclass, replace

from brim.hardware.device import Device
from brim.memory import closed_form
from brim.memory.anatomy import anatomy
from brim.memory.constants import context_bytes, cublas_workspace_bytes
from brim.memory.rough import closed_form_knows
from brim.models.spec import ModelSpec
from brim.recipe import Parallel, Recipe
from brim.speed.roofline import step_time

_MICRO_BATCHES = 4
"""For each stage, where accumulation is open: a fifth of the time is idle then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipelined:
    """A recipe's step in stages, one on each device."""

    stages: int
    blocks: int
    """Of each stage."""
    micro_batches: int
    peak_bytes: int
    """Of the busiest device."""
    tokens_per_s: float

    @property
    def idle(self) -> float:
        """Share of the time in which a stage waits for the first or the last micro-batch."""
        return (self.stages - 1) / (self.micro_batches + self.stages - 1)


def pipelined(spec: ModelSpec, recipe: Recipe, device: Device) -> Pipelined | None:
    """The recipe with a stage for each of its devices, and one row at a time: as many wait as there are stages.

    None where its blocks are fewer, or not known.
    """
    stages, blocks = recipe.parallel.devices, -(-spec.num_layers // recipe.parallel.devices)
    layers = next((key for key in ("num_hidden_layers", "n_layer") if key in spec.config), None)
    if layers is None or stages > spec.num_layers or not closed_form_knows(spec, recipe) or spec.task != "causal-lm":
        return None
    micro_batches = max(_MICRO_BATCHES * stages, recipe.grad_accumulation)
    optimizer = replace(recipe.optimizer, in_backward=False)
    memory = replace(recipe.memory, offload="none")
    alone = replace(
        recipe,
        micro_batch_size=1,
        grad_accumulation=micro_batches,
        parallel=Parallel(),
        optimizer=optimizer,
        memory=memory,
    )
    share = replace(spec, config={**spec.config, layers: blocks}, tensors=())
    share = replace(share, num_parameters=anatomy(share).num_parameters)
    seconds = step_time(spec, alone, device) / stages * (micro_batches + stages - 1) / micro_batches
    return Pipelined(
        stages=stages,
        blocks=blocks,
        micro_batches=micro_batches,
        peak_bytes=_stage_bytes(share, alone, device, in_flight=min(stages, micro_batches)),
        tokens_per_s=alone.tokens_per_step / seconds,
    )


def _stage_bytes(share: ModelSpec, alone: Recipe, device: Device, *, in_flight: int) -> int:
    """A device's peak with this share of the model, the earlier of its micro-batches waiting for their backward."""
    step = closed_form.step_of(share, alone)
    waiting = (in_flight - 1) * (step.block_activations + step.outside_blocks)
    flowing = max(step.ledger(moment).total for moment in step.flowing().values())
    beside = 2 * cublas_workspace_bytes(device) + context_bytes(device) if device.kind == "cuda" else 0
    return max(flowing + waiting, step.ledger(step.at_optimizer()).total) + beside
