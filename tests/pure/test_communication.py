"""What devices of a sharded step tell each other, by laws that every ring keeps."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.hardware import find
from brim.models import describe
from brim.recipe import Recipe
from brim.speed.communication import BETWEEN_NODES, communication_s, talking

H100 = find("h100")
SPEC = describe("llama-3.1-8b")


def recipe(sharding: str, *, nodes: int = 1, devices: int = 8, turns: int = 1) -> Recipe:
    return Recipe(model=SPEC.name, grad_accumulation=turns).with_values(
        {"parallel.sharding": sharding, "parallel.nodes": nodes, "parallel.devices_per_node": devices}
    )


def test_one_device_says_nothing() -> None:
    """No ring of one."""
    alone = Recipe(model=SPEC.name)
    assert communication_s(SPEC, alone, H100) == 0
    assert talking(SPEC, alone, H100, 1.5) == 1.5


def test_a_ring_by_hand() -> None:
    """ZeRO-2 on 8: each link carries 7/8 of the weights' bytes and of the gradients', at four fifths of 450 GB/s."""
    nbytes = 2 * SPEC.num_parameters
    assert communication_s(SPEC, recipe("zero2"), H100) == pytest.approx(2 * 7 / 8 * nbytes / (0.8 * 450e9))


def test_zero3_says_half_as_much_again_as_zero2() -> None:
    """Parameters are gathered twice and gradients reduced once: 3 to 2 (ZeRO, arXiv:1910.02054, section 7.2.2)."""
    twice = communication_s(SPEC, recipe("zero2"), H100)
    assert communication_s(SPEC, recipe("zero3"), H100) == pytest.approx(1.5 * twice)


def test_copies_across_nodes_say_less_between_them() -> None:
    """HSDP keeps its gathers within a node, so the slow link carries less than ZeRO-3's whole ring."""
    across = communication_s(SPEC, recipe("zero3", nodes=4), H100)
    assert communication_s(SPEC, recipe("hsdp", nodes=4), H100) < across
    assert across == pytest.approx(3 * 31 / 32 * 2 * SPEC.num_parameters / (0.8 * BETWEEN_NODES))


@given(st.sampled_from(["zero2", "zero3"]), st.integers(2, 64), st.integers(1, 8), st.floats(1e-3, 1e3))
def test_time_is_between_the_longer_and_the_sum(sharding: str, devices: int, turns: int, working_s: float) -> None:
    """Nothing hides more than the shorter of work and talk, a block's worth of talk apart; more turns take longer."""
    asked = recipe(sharding, devices=devices, turns=turns)
    said = communication_s(SPEC, asked, H100)
    seconds = talking(SPEC, asked, H100, working_s)
    assert max(working_s, said) <= seconds <= working_s + said
    assert said == pytest.approx(turns * communication_s(SPEC, replace(asked, grad_accumulation=1), H100))
