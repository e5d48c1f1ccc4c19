"""The processes that train together: which of them this is, and what they tell each other.

A mesh has three axes: `replicate` (copies of the model), `shard` (parts of one copy) and `tensor` (parts of one
matrix). Only axes that a recipe uses are made.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from brim.errors import UsageError
from brim.recipe import Recipe
from brim.training.gloo import settled, settling
from brim.training.processes import RENDEZVOUS
from brim.training.workplace import error_number

_TIMEOUT = timedelta(minutes=10)
"""For one collective: a rank that waits longer has lost the others."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among all."""

    rank: int = 0
    mesh: DeviceMesh | None = None
    """None: this process is alone."""

    @property
    def is_first(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0

    @property
    def count(self) -> int:
        """All processes."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def over_gloo(self) -> bool:
        """Real processes whose tensors are a processor's."""
        return self.mesh is not None and self.mesh.device_type == "cpu" and dist.get_backend() == "gloo"

    @property
    def original(self) -> int:
        """The first rank that holds the same parts of weights: this one, unless the model has copies."""
        if self.mesh is None or "replicate" not in (self.mesh.mesh_dim_names or ()):
            return self.rank
        return self.rank % (self.mesh.size() // self.mesh["replicate"].size())

    @property
    def data(self) -> DeviceMesh | None:
        """The axes along which rows differ; None where all ranks see the same rows."""
        if self.mesh is None:
            return None
        names = tuple(name for name in (self.mesh.mesh_dim_names or ()) if name != "tensor")
        return self.mesh[names] if names else None

    @property
    def data_rank(self) -> int:
        """Which share of the rows is this process's."""
        if self.data is None:
            return 0
        sizes, place = self.data.shape, self.data.get_coordinate()
        assert place is not None
        number = 0
        for size, index in zip(sizes, place, strict=True):
            number = number * size + index
        return number

    def add(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that see different rows, in place."""
        if self.data is not None:
            for name in self.data.mesh_dim_names or ():
                settled(tensor, partial(dist.all_reduce, group=self.data.get_group(name)))
        return tensor

    def add_matrices(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that share matrices, in place."""
        assert self.mesh is not None
        settled(tensor, partial(dist.all_reduce, group=self.mesh.get_group("tensor")))
        return tensor

    @property
    def data_count(self) -> int:
        """As many shares of the rows there are."""
        return 1 if self.data is None else self.data.size()

    def told(self, value: Any) -> list[Any]:
        """Each rank's value, by rank; all of them wait for each other here."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def highest(self, *values: int) -> tuple[int, ...]:
        """Each value's highest over all ranks."""
        if self.mesh is None:
            return values
        # On the processor, whose gloo is there on a GPU, too: no NCCL communicator for it.
        found = torch.tensor(values, dtype=torch.int64)
        settled(found, partial(dist.all_reduce, op=dist.ReduceOp.MAX))
        return tuple(found.tolist())

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns, once all ranks have done theirs; what the system refused one is raised in all."""
        if self.mesh is None:
            return work()
        failure: OSError | SafetensorError | None = None
        try:
            result = work()
        except (OSError, SafetensorError) as error:
            failure = error
        (number,) = self.highest(0 if failure is None else error_number(failure) or errno.EIO)
        if failure is not None:
            raise failure
        if number:
            raise OSError(number, f"in another rank: {os.strerror(number)}")
        return result

    def wait(self) -> None:
        """Until all ranks are here."""
        self.any(False)

    def any(self, asked: bool) -> bool:
        """Whether any process was asked; the same answer in all."""
        return bool(self.highest(asked)[0])


ALONE = Ranks()


def mesh_axes(recipe: Recipe) -> dict[str, int]:
    """Axis -> size, outermost first; empty for one device."""
    parallel = recipe.parallel
    rows = parallel.data_ranks
    axes: dict[str, int] = {}
    match parallel.sharding:
        case _ if rows == 1:
            pass  # nobody else sees other rows
        case "ddp" | "zero1":
            axes["replicate"] = rows
        case "zero2" | "zero3":
            axes["shard"] = rows
        case "hsdp":
            axes |= {"replicate": parallel.nodes, "shard": rows // parallel.nodes}
    if parallel.tensor > 1:
        axes["tensor"] = parallel.tensor
    return axes


def group_sizes(recipe: Recipe) -> list[int]:
    """Of the groups that a rank talks in, a communicator each: one for each axis, and one for two that are summed over
    at once."""
    axes = {name: size for name, size in mesh_axes(recipe).items() if size > 1}
    both = [recipe.parallel.devices] if {"shard", "tensor"} <= axes.keys() else []
    return [*axes.values(), *both]


def _mesh(device: str, axes: dict[str, int]) -> DeviceMesh:
    mesh = init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes))
    if "shard" in axes and "tensor" in axes:
        mesh["shard", "tensor"]._flatten()  # the norm of gradients is then summed over both at once
    return mesh


@contextmanager
def imagined_ranks(recipe: Recipe) -> Iterator[Ranks]:
    """The first of as many ranks as the recipe says; the others exist by name alone, and collectives move nothing."""
    axes = mesh_axes(recipe)
    if not axes:
        yield ALONE
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=recipe.parallel.devices)
    try:
        yield Ranks(rank=0, mesh=_mesh("cpu", axes))
    finally:
        dist.destroy_process_group()


@contextmanager
def joined_ranks(recipe: Recipe, device: str) -> Iterator[Ranks]:
    """This process among those that `processes.run_ranks` or torchrun started. Raises UsageError when they are not as
    many as the recipe says."""
    axes = mesh_axes(recipe)
    if not axes:
        yield ALONE
        return
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size != recipe.parallel.devices:
        raise UsageError(
            f"the recipe wants {recipe.parallel.nodes} x {recipe.parallel.devices_per_node} processes, and {size} were "
            "started; start it under torchrun with as many, or change parallel.nodes and parallel.devices_per_node"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    meet = os.environ.get(RENDEZVOUS)
    if meet is not None and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # local ranks have nothing to say beyond this machine
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method="env://" if meet is None else f"file://{meet}",
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
    )
    try:
        with settling() if device == "cpu" else nullcontext():
            yield Ranks(rank=rank, mesh=_mesh(device, axes))
    finally:
        dist.destroy_process_group()
