"""Ranks that divide weights each read their own part of the files, which are mapped until then."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from brim.models import describe
from brim.models.skeleton import load
from brim.recipe import Recipe
from brim.training.build import build
from brim.training.parts import part_of
from brim.training.ranks import imagined_ranks


def mapped_ranges(file: Path) -> list[tuple[int, int]]:
    """Where in this process's memory the system has mapped the file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(file.resolve()))]
    return [(int(first, 16), int(last, 16)) for first, last in ranges]


def lies_in(tensor: torch.Tensor, ranges: list[tuple[int, int]]) -> bool:
    return any(first <= tensor.data_ptr() < last for first, last in ranges)


def test_weights_that_are_to_be_divided_stay_in_their_file(tiny_directory: Callable[[str], Path]) -> None:
    """The system's own map says so; without being asked to, each is a copy in memory."""
    directory = tiny_directory("llama")
    (file,) = directory.glob("*.safetensors")
    for mapped in (True, False):
        model = load(describe(str(directory)), directory, dtype="fp32", attention="sdpa", mapped=mapped)
        ranges = mapped_ranges(file)
        assert {lies_in(parameter, ranges) for parameter in model.parameters()} == {mapped}


def test_a_rank_has_its_rows_of_the_file_in_memory_of_its_own(tiny_directory: Callable[[str], Path]) -> None:
    directory = tiny_directory("llama")
    (file,) = directory.glob("*.safetensors")
    stored, spec = load_file(file), describe(str(directory))
    divided = ["parallel.devices_per_node=2", "parallel.sharding=zero3", "precision.weights=fp32"]
    recipe = Recipe(model=str(directory), seq_len=16).with_settings(divided)
    with imagined_ranks(recipe) as ranks:
        workload = build(recipe, spec, weights=directory, ranks=ranks)
        for name, parameter in workload.model.named_parameters():
            part = part_of(parameter.detach())
            assert part.shape[0] == (parameter.shape[0] + 1) // 2
            assert torch.equal(part, stored[name][: part.shape[0]])
            assert not lies_in(part, mapped_ranges(file))
