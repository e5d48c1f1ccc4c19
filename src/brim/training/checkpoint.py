"""Checkpoints of a run: complete or absent, enough to go on bit by bit.

A checkpoint is a directory `step-N`: `trainable.safetensors` (what the method trains), `optimizer.safetensors` (its
state, and the random generator's), `state.json` (steps done, losses so far). No pickle.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from brim.errors import ModelFileError, UsageError
from brim.publish import whole_directory
from brim.training.build import Workload

_RANDOM = "random_generator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run has come."""

    steps_done: int
    losses: tuple[float, ...]


def save_checkpoint(directory: Path, workload: Workload, progress: Progress) -> Path:
    """Write `step-N` below `directory`, then remove the older ones."""
    target = directory / f"step-{progress.steps_done:08d}"
    if not target.exists():
        with whole_directory(target) as partial:
            save_file(_trainable(workload), partial / "trainable.safetensors")
            save_file(_optimizer_state(workload), partial / "optimizer.safetensors")
            state = {
                "steps_done": progress.steps_done,
                "losses": list(progress.losses),
                "recipe": workload.recipe.to_dict(),
            }
            (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for older in _checkpoints(directory)[:-1]:
        shutil.rmtree(older)
    return target


def load_checkpoint(directory: Path, workload: Workload) -> Progress | None:
    """Put the newest checkpoint's state into the workload; None where there is no checkpoint.

    Raises UsageError when it belongs to another recipe, ModelFileError when it is damaged.
    """
    found = _checkpoints(directory)
    if not found:
        return None
    newest = found[-1]
    try:
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        trainable = load_file(newest / "trainable.safetensors")
        optimizer = load_file(newest / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelFileError(f"checkpoint {newest} is damaged: {error}; remove it to start over") from None
    if state["recipe"] != workload.recipe.to_dict():
        raise UsageError(f"checkpoint {newest} belongs to another recipe; tune without --resume, or with that recipe")
    _restore(workload, trainable, optimizer)
    return Progress(steps_done=int(state["steps_done"]), losses=tuple(state["losses"]))


def _restore(workload: Workload, trainable: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in workload.trainable.items():
            parameter.copy_(trainable[name])
    torch.set_rng_state(optimizer.pop(_RANDOM))
    workload.optimizer.load_state_dict(optimizer)


def _trainable(workload: Workload) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in workload.trainable.items()}


def _optimizer_state(workload: Workload) -> dict[str, Tensor]:
    return {**workload.optimizer.state_dict(), _RANDOM: torch.get_rng_state()}


def _checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first; a partial one has another name."""
    return sorted(directory.glob("step-*"))
