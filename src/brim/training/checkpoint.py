"""Checkpoints of a run: complete or absent, enough to go on bit by bit.

A checkpoint is a directory `step-N`: `trainable.safetensors` (what the method trains), `optimizer.safetensors` (its
state, and the random generators'), `state.json` (what was done and measured so far, of which recipe and data).
No pickle.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from brim.errors import ModelFileError, UsageError
from brim.publish import whole_directory
from brim.report import Ledger, Peak
from brim.training.build import Workload

_RANDOM = "random_generator"
_CUDA_RANDOM = "cuda_random_generator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run has come, and what was measured on the way."""

    losses: tuple[float, ...]
    """One a step."""
    step_seconds: tuple[float, ...]
    peak: Peak
    ledger: Ledger

    @property
    def steps_done(self) -> int:
        return len(self.losses)

    def to_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "step_seconds": list(self.step_seconds),
            "peak": self.peak.to_dict(),
            "ledger": self.ledger.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        return cls(
            losses=tuple(values["losses"]),
            step_seconds=tuple(values["step_seconds"]),
            peak=Peak(**values["peak"]),
            ledger=Ledger(**values["ledger"]),
        )


def save_checkpoint(directory: Path, workload: Workload, progress: Progress, *, data: str) -> Path:
    """Write `step-N` below `directory`, then remove the older ones. `data` tells one data set from another."""
    target = directory / f"step-{progress.steps_done:08d}"
    if not target.exists():
        with whole_directory(target) as partial:
            save_file(_trainable(workload), partial / "trainable.safetensors")
            save_file(_optimizer_state(workload), partial / "optimizer.safetensors")
            state = {"recipe": workload.recipe.to_dict(), "data": data, "progress": progress.to_dict()}
            (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    # Older ones, and what a killed run left of one that it was writing.
    for older in [*_checkpoints(directory)[:-1], *directory.glob(".step-*")]:
        shutil.rmtree(older)
    return target


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
        _check_same(newest, state["recipe"] == workload.recipe.to_dict(), "recipe")
        _check_same(newest, state["data"] == data, "data")
        progress = Progress.from_dict(state["progress"])
        _restore(workload, load_file(newest / "trainable.safetensors"), load_file(newest / "optimizer.safetensors"))
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelFileError(
            f"checkpoint {newest} is damaged ({type(error).__name__}: {error}); remove it to start over"
        ) from None
    return progress


def _check_same(checkpoint: Path, same: bool, what: str) -> None:
    if not same:
        raise UsageError(
            f"checkpoint {checkpoint} belongs to another {what}; go on with that {what}, or choose another --output"
        )


def _restore(workload: Workload, trainable: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in workload.trainable.items():
            if trainable[name].shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(trainable[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(trainable[name])
    torch.set_rng_state(optimizer.pop(_RANDOM))
    if workload.device.type == "cuda":
        torch.cuda.set_rng_state(optimizer.pop(_CUDA_RANDOM), workload.device)
    workload.optimizer.load_state_dict(optimizer)


def _trainable(workload: Workload) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in workload.trainable.items()}


def _optimizer_state(workload: Workload) -> dict[str, Tensor]:
    state = {**workload.optimizer.state_dict(), _RANDOM: torch.get_rng_state()}
    if workload.device.type == "cuda":
        state[_CUDA_RANDOM] = torch.cuda.get_rng_state(workload.device)
    return state


def _checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first; a partial one has another name."""
    return sorted(directory.glob("step-*"))
