"""Pipeline stages by closed form, against the schedule played move by move and the step of one device."""

from dataclasses import replace

import pytest

from brim.hardware import find
from brim.memory.closed_form import closed_form
from brim.memory.constants import context_bytes, cublas_workspace_bytes
from brim.models import describe
from brim.planning.pipeline import Pipelined, pipelined
from brim.recipe import Recipe

SPEC, GPU = describe("llama-3.1-8b"), find("h100")


def _idle(stages: int, micro_batches: int) -> float:
    """Every forward takes a tick, as every backward; a stage does what is ready, backward first."""
    forwards = [[0] * micro_batches for _ in range(stages)]
    backwards = [[0] * micro_batches for _ in range(stages)]
    tick = 0
    while not all(map(all, backwards)):
        tick += 1
        for stage in range(stages):
            for one in range(micro_batches):
                ready = backwards[stage + 1][one] if stage + 1 < stages else forwards[stage][one]
                if not backwards[stage][one] and forwards[stage][one] and 0 < ready < tick:
                    backwards[stage][one] = tick
                    break
            else:
                waiting = sum(map(bool, forwards[stage])) - sum(map(bool, backwards[stage]))
                for one in range(micro_batches):
                    ready_at = forwards[stage - 1][one] if stage else -1
                    if not forwards[stage][one] and (ready_at < tick and ready_at) and waiting < stages - stage:
                        forwards[stage][one] = tick
                        break
    return 1 - 2 * micro_batches / tick


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 2), (2, 8), (4, 4), (4, 16), (8, 32)])
def test_the_idle_share_is_that_of_the_schedule(stages: int, micro_batches: int) -> None:
    """Played tick by tick, each stage with at most as many micro-batches as there are stages behind it."""
    told = Pipelined(stages=stages, blocks=1, micro_batches=micro_batches, peak_bytes=0, tokens_per_s=1)
    assert told.idle == pytest.approx(_idle(stages, micro_batches))


def test_one_stage_is_a_device_that_accumulates_and_more_stages_hold_less() -> None:
    """Of one device, the closed form's own peak; weights and states of stages fall as blocks are divided."""
    recipe = Recipe(model="llama-3.1-8b", seq_len=256)
    one = pipelined(SPEC, recipe, GPU)
    assert one is not None and one.idle == 0 and one.blocks == SPEC.num_layers
    alone = closed_form(SPEC, replace(recipe, grad_accumulation=one.micro_batches)).total
    assert one.peak_bytes == alone + 2 * cublas_workspace_bytes(GPU) + context_bytes(GPU)
    many = (recipe.with_settings([f"parallel.devices_per_node={n}", "parallel.sharding=zero3"]) for n in (2, 4, 8))
    found = [one, *(pipelined(SPEC, each, GPU) for each in many)]
    peaks = [each.peak_bytes for each in found if each is not None]
    assert len(peaks) == 4 and peaks == sorted(peaks, reverse=True)


def test_more_stages_than_blocks_are_none() -> None:
    recipe = Recipe(model="gpt2").with_settings(["parallel.devices_per_node=16", "parallel.sharding=zero3"])
    assert pipelined(describe("gpt2"), recipe, GPU) is None
