"""How far hardware reaches, by laws that hold whatever the closed form says."""

import pytest

from brim.hardware import find
from brim.models import describe
from brim.planning import Constraints, NothingFitsError, Offer
from brim.planning.estimate import estimate, upper_bound
from brim.planning.limits import Limits, limits
from brim.planning.search import plan
from brim.recipe import Recipe
from brim.report import Prediction
from brim.units import GIB

SPEC = describe("smollm2-135m")
GPU = find("rtx-3060")
DEVICES = [find(name) for name in ("h100", "rtx-3070", "a100", "rtx-4090")]
BUDGET = 3 * GIB


@pytest.fixture(scope="module")
def reached() -> Limits:
    return limits(SPEC, GPU, Constraints(method="full"), budget_bytes=BUDGET, devices=DEVICES)


def more(prediction: Prediction, key: str, by: int) -> Recipe:
    recipe = Recipe.from_dict(prediction.recipe)
    return recipe.with_values({key: getattr(recipe, key) + by})


@pytest.mark.parametrize(
    ("name", "key", "by"), [("longest_row", "seq_len", 64), ("largest_batch", "micro_batch_size", 1)]
)
def test_what_is_named_fits_and_one_more_does_not(reached: Limits, name: str, key: str, by: int) -> None:
    """The limit is the last that fits: the same recipe one step further does not."""
    found = getattr(reached, name)
    assert found is not None and upper_bound(found) <= BUDGET
    further = more(found, key, by)
    positions = SPEC.config["max_position_embeddings"]
    if key == "seq_len" and further.seq_len > positions:
        return
    assert upper_bound(estimate(SPEC, further, device=GPU, budget_bytes=BUDGET)) > BUDGET


def test_the_smallest_device_holds_the_job_and_no_smaller_one_does() -> None:
    """A plan fits it; on the next smaller one there is none. More devices never need a larger one."""
    spec = describe("llama-3.1-8b")
    job = Constraints(method="full", may_offload=False, settings=("optimizer.name=adamw", "memory.loss=chunked"))
    smallest = limits(spec, GPU, job, budget_bytes=BUDGET, devices=DEVICES).smallest
    sizes = {device.name: device.memory_bytes for device in DEVICES}
    memories = [sizes[smallest[count].device_name] for count in sorted(smallest)]
    assert memories == sorted(memories, reverse=True)
    for count, prediction in smallest.items():
        chosen = next(device for device in DEVICES if device.name == prediction.device_name)
        offer = Offer(device=chosen, budget_bytes=chosen.memory_bytes, devices_per_node=count)
        result = plan(spec, [offer], rehearse=None, constraints=job)
        assert result.best is not None
        smaller = [device for device in DEVICES if device.memory_bytes < chosen.memory_bytes]
        recipe = Recipe.from_dict(prediction.recipe)
        assert not any(estimate(spec, recipe, device=d, budget_bytes=d.memory_bytes).fits for d in smaller)


def test_what_the_constraints_decide_is_no_limit() -> None:
    """A pinned length is not told as the longest."""
    asked = Constraints(method="full", settings=("seq_len=128", "micro_batch_size=1"))
    found = limits(SPEC, GPU, asked, budget_bytes=BUDGET, devices=DEVICES[:1])
    assert found.longest_row is None and found.largest_batch is None


def test_the_largest_model_fits_and_no_larger_one_does() -> None:
    """Of the models given: each that is larger has no recipe that fits, by the search itself."""
    models = [describe(name) for name in ("smollm2-135m", "smollm2-360m", "qwen2.5-0.5b", "smollm2-1.7b")]
    asked = Constraints(method="full", seq_len=256, settings=("memory.offload=none", "optimizer.name=adamw"))
    found = limits(SPEC, GPU, asked, budget_bytes=5 * GIB, devices=DEVICES[:1], models=models).largest_model
    assert found is not None and found.fits and found.model != models[-1].name
    largest = describe(found.model).num_parameters
    offer = Offer(device=GPU, budget_bytes=5 * GIB)
    for larger in (model for model in models if model.num_parameters > largest):
        with pytest.raises(NothingFitsError):
            plan(larger, [offer], rehearse=None, constraints=asked)
