"""Checkpoints of a run: complete or absent, enough to go on bit by bit.

A checkpoint is a directory `step-N`: `trainable.safetensors` (what the method trains), `optimizer.safetensors` (its
state, and the random generators'), `state.json` (what was done and measured so far, of which recipe and data).
No pickle. Of several ranks each writes its own parts, in files `...-RANK.safetensors`; where the model has copies, the
first rank that holds a part. They go on in the same number, which the recipe says.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from brim.checkpoints.reader import tiles
from brim.errors import ModelFileError, UsageError
from brim.memory import owners
from brim.models.directory import StoredTensor
from brim.models.safetensors_header import read_header
from brim.numerics.encode import TORCH_DTYPES
from brim.publish import partial_of, whole_directory
from brim.report import Ledger, Peak
from brim.training.build import Workload
from brim.training.optimizer import like
from brim.training.parts import part_of
from brim.training.ranks import Ranks

_RANDOM = "random_generator"
_CUDA_RANDOM = "cuda_random_generator"
_LOSS_SCALE = "loss_scale"
_MAY_CHANGE = (
    "training.save_every", "training.evaluate_every", "training.on_spike", "memory.loss",
    "memory.activation_checkpointing",
)  # fmt: skip
"""What a run that goes on may do in another way than before: it learns the same, though not the same bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run has come, and what was measured on the way."""

    losses: tuple[float, ...]
    """One a step."""
    step_seconds: tuple[float, ...]
    peak: Peak
    ledger: Ledger
    left_out: tuple[int, ...] = ()
    """Of the data's batches, those that are not read (training/setbacks.py)."""

    @property
    def steps_done(self) -> int:
        return len(self.losses)

    def to_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "step_seconds": list(self.step_seconds),
            "peak": self.peak.to_dict(),
            "ledger": self.ledger.to_dict(),
            "left_out": list(self.left_out),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        return cls(
            losses=tuple(values["losses"]),
            step_seconds=tuple(values["step_seconds"]),
            peak=Peak(**values["peak"]),
            ledger=Ledger(**values["ledger"]),
            left_out=tuple(values["left_out"]),
        )


def save_checkpoint(directory: Path, workload: Workload, progress: Progress, *, data: str) -> Path:
    """Write `step-N` below `directory`, then remove the older ones. `data` tells one data set from another.

    When the system refuses (a full disk), it is refused to all ranks, and what was there before stays.
    """
    target, ranks = directory / f"step-{progress.steps_done:08d}", workload.ranks
    if not ranks.any(target.exists()):
        whole: AbstractContextManager[Path] = (
            whole_directory(target) if ranks.is_first else nullcontext(partial_of(target))
        )
        with ExitStack() as stack:
            partial = ranks.together(lambda: stack.enter_context(whole))  # the directory is there
            ranks.together(lambda: _write(workload, partial, progress, data))
            ranks.together(stack.close)  # all is in it, and it has its name
    if ranks.is_first:
        # Older ones, and what a killed run left of one that it was writing.
        for older in [*_checkpoints(directory)[:-1], *directory.glob(".step-*")]:
            shutil.rmtree(older)
    ranks.wait()
    return target


def wrong_weight(workload: Workload) -> str:
    """Name of a trained weight that is no number, on any rank; empty where all are."""
    wrong = ""
    for name, parameter in workload.trainable.items():
        part = part_of(parameter.detach())
        # Not by way of `abs`: a copy of the largest weight may be more than there is room for.
        if part.numel() and not all(math.isfinite(end) for end in part.aminmax()):
            wrong = wrong or name
    # All ranks must know: those that went on would wait for this one.
    return next((name for name in workload.ranks.told(wrong) if name), "")


def kept(workload: Workload) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a checkpoint holds, as it is and not copied: trained weights; the optimizer's state and all else."""
    ranks = workload.ranks
    trainable = _trainable(workload) if ranks.original == ranks.rank else {}
    return trainable, _optimizer_state(workload, is_copy=_optimizer_rank(workload) != ranks.rank)


def _write(workload: Workload, directory: Path, progress: Progress, data: str) -> None:
    ranks = workload.ranks
    trainable, rest = kept(workload)
    if ranks.original == ranks.rank:
        save_file(trainable, directory / _file("trainable", ranks, ranks.rank))
    save_file(rest, directory / _file("optimizer", ranks, ranks.rank))
    if ranks.is_first:
        state = {"recipe": workload.recipe.to_dict(), "data": data, "progress": progress.to_dict()}
        (directory / "state.json").write_text(json.dumps(state), encoding="utf-8")


def _optimizer_rank(workload: Workload) -> int:
    """Which rank's file holds the states that are in this one."""
    return workload.ranks.rank if workload.recipe.parallel.sharding == "zero1" else workload.ranks.original


def _file(what: str, ranks: Ranks, rank: int) -> str:
    return f"{what}.safetensors" if ranks.count == 1 else f"{what}-{rank}.safetensors"


def load_checkpoint(directory: Path, workload: Workload, *, data: str) -> Progress | None:
    """Put the newest checkpoint's state into the workload; None where there is no checkpoint.

    Raises UsageError when it belongs to another recipe or other data, ModelFileError when it is damaged.
    """
    found = _checkpoints(directory)
    if not found:
        return None
    newest = found[-1]
    try:
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        _check_same(newest, _what_is_learned(state["recipe"]) == _what_is_learned(workload.recipe.to_dict()), "recipe")
        _check_same(newest, state["data"] == data, "data")
        progress = Progress.from_dict(state["progress"])
        _restore(workload, newest)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelFileError(
            f"checkpoint {newest} is damaged ({type(error).__name__}: {error}); remove it to start over"
        ) from None
    return progress


def _what_is_learned(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without what a run may be gone on with in another way."""
    sections = {
        name: {key: value for key, value in recipe[name].items() if f"{name}.{key}" not in _MAY_CHANGE}
        for name in ("training", "memory")
    }
    rows = recipe["micro_batch_size"] * recipe["grad_accumulation"]
    return {**recipe, **sections, "micro_batch_size": rows, "grad_accumulation": 1}


def _check_same(checkpoint: Path, same: bool, what: str) -> None:
    if not same:
        raise UsageError(
            f"checkpoint {checkpoint} belongs to another {what}; go on with that {what}, or choose another --output"
        )


class _Stored(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for: all at once would take more memory than training does."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self._tensors = {
            entry.spec.name: StoredTensor(spec=entry.spec, path=path, offset=header.data_start + entry.begin)
            for entry in header.tensors
        }

    def __getitem__(self, name: str) -> Tensor:
        stored = self._tensors[name]
        tensor = torch.empty(stored.spec.shape, dtype=TORCH_DTYPES.get(stored.spec.dtype, torch.uint8))
        filled = 0
        for tile in tiles(stored):
            tensor.view(-1)[filled : filled + len(tile)] = tile
            filled += len(tile)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _restore(workload: Workload, checkpoint: Path) -> None:
    ranks = workload.ranks
    trainable = _Stored(checkpoint / _file("trainable", ranks, ranks.original))
    optimizer = _Stored(checkpoint / _file("optimizer", ranks, _optimizer_rank(workload)))
    own = _Stored(checkpoint / _file("optimizer", ranks, ranks.rank))
    with torch.no_grad():
        for name, parameter in workload.trainable.items():
            part = part_of(parameter)
            part.copy_(like(trainable[name], part, name))
    workload.optimizer.load_state_dict(optimizer)
    owners.claim("optimizer", workload.optimizer.tensors())
    if workload.loss_scale is not None:
        workload.loss_scale.load_state(own[_LOSS_SCALE])
    torch.set_rng_state(own[_RANDOM])
    if workload.device.type == "cuda":
        torch.cuda.set_rng_state(own[_CUDA_RANDOM], workload.device)


def _trainable(workload: Workload) -> dict[str, Tensor]:
    return {name: part_of(parameter.detach()) for name, parameter in workload.trainable.items()}


def _optimizer_state(workload: Workload, *, is_copy: bool) -> dict[str, Tensor]:
    states = {} if is_copy else workload.optimizer.state_dict()
    state = {**states, _RANDOM: torch.get_rng_state()}
    if workload.loss_scale is not None:
        state[_LOSS_SCALE] = workload.loss_scale.state()
    if workload.device.type == "cuda":
        state[_CUDA_RANDOM] = torch.cuda.get_rng_state(workload.device)
    return state


def _checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first; a partial one has another name."""
    return sorted(directory.glob("step-*"))
