"""Numbers of many recipes at once are those of each recipe's own estimate."""

import pytest

from brim.hardware import find
from brim.models import describe
from brim.planning import Constraints, Offer
from brim.planning.candidates import candidates_of
from brim.planning.estimate import estimate

CASES = {
    "one GPU": ("llama-3.1-8b", "rtx-4090", Constraints(may_offload=True)),
    "an encoder-decoder, accumulating": ("flan-t5-base", "rtx-4090", Constraints(global_batch_size=12)),
    "rounded weights": ("gpt2", "a100", Constraints(method="qat")),
    "two nodes, accumulating": (
        "llama-3.1-8b", "h100", Constraints(devices_per_node=4, nodes=2, global_batch_size=64),
    ),
    "devices with hosts": ("llama-3.1-8b", "h100", Constraints(devices_per_node=2, may_offload=True, method="full")),
    "shared matrices": ("llama-3.1-8b", "h100", Constraints(devices_per_node=4, settings=("parallel.tensor=2",))),
    "a family without a closed form": ("bert-base-uncased", "a100", Constraints()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_candidates_numbers_are_its_estimates(case: str) -> None:
    """To the byte, and to the last digits of the time; and so is whether it fits."""
    name, gpu, constraints = CASES[case]
    spec, device = describe(name), find(gpu)
    counts = {"devices_per_node": constraints.devices_per_node, "nodes": constraints.nodes}
    offer = Offer(device=device, budget_bytes=device.memory_bytes, **counts)
    for candidate in candidates_of(spec, offer, constraints)[::23]:
        whole = estimate(spec, candidate.recipe, device=device, budget_bytes=offer.budget_bytes)
        assert candidate.peak_bytes == whole.peak.highest_bytes
        assert candidate.tokens_per_s == pytest.approx(whole.tokens_per_s, rel=1e-12)
        assert candidate.fits == whole.fits
