"""Where a run works: `OUTPUT.partial`, which becomes OUTPUT when everything is in it.

It holds `recipe.toml`, `metrics.jsonl`, `events/` and, of an interrupted run, `checkpoints/`.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from brim.errors import UsageError
from brim.publish import check_room, sync, sync_tree, write_whole
from brim.recipe import Recipe
from brim.report import Ledger


def workplace_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def checkpoints_of(output: Path) -> Path:
    return workplace_of(output) / "checkpoints"


def hidden_of(output: Path, rank: int) -> Path:
    """A rank's hidden states, while QAT's first scales are chosen."""
    return workplace_of(output) / f"hidden-{rank}"


def can_resume(output: Path) -> bool:
    """An interrupted run left a checkpoint that this output can go on from."""
    return any(checkpoints_of(output).glob("step-*"))


def steps_kept(output: Path) -> int:
    """Steps of an interrupted run that its newest checkpoint holds."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoints_of(output).glob("step-*")), default=0)


def check_output(output: Path, *, resume: bool) -> None:
    """Raises UsageError when OUTPUT, or an interrupted run that is not to go on, is there already."""
    if output.exists():
        raise UsageError(f"{output} is there already; choose another --output, or move it away")
    workplace = workplace_of(output)
    if not workplace.exists():
        return
    if can_resume(output):
        if not resume:
            raise UsageError(f"{workplace} holds an interrupted run; go on with --resume, or remove it to start over")
    elif not workplace.is_dir() or (any(workplace.iterdir()) and not (workplace / "recipe.toml").exists()):
        raise UsageError(f"{workplace} is where the run would work, and holds something else; move it away")


def open_workplace(output: Path, recipe: Recipe, predicted: Ledger, *, resume: bool) -> Path:
    """The directory to work in: an interrupted run's to go on in, else an empty one with the recipe in it.

    Raises what `check_output` does, and DoesNotFitError when the disk lacks the room.
    """
    check_output(output, resume=resume)
    trained_bytes = predicted.weights if recipe.trains_weights else predicted.optimizer
    # Two checkpoints while the newer is written; or one, and the model.
    check_room(output, 2 * (trained_bytes + predicted.optimizer), what="the run's checkpoints and output")
    workplace = workplace_of(output)
    if not can_resume(output):
        # What a run left that was killed before its first checkpoint.
        shutil.rmtree(workplace, ignore_errors=True)
        workplace.mkdir(parents=True)
        write_whole(workplace / "recipe.toml", recipe.to_toml())
    return workplace


def discard_unbegun(output: Path) -> None:
    """Remove a workplace in which no step was done."""
    metrics = workplace_of(output) / "metrics.jsonl"
    if not can_resume(output) and not (metrics.exists() and metrics.stat().st_size):
        shutil.rmtree(workplace_of(output), ignore_errors=True)


def publish(output: Path, write: Callable[[Path], None]) -> None:
    """Let `write` put the model into the workplace, then give that its final name; a part of a model never stays."""
    workplace = workplace_of(output)
    staging = workplace / "model"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        write(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    for path in staging.iterdir():
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors makes files that only their owner can read
        path.rename(workplace / path.name)
    staging.rmdir()
    sync_tree(workplace)
    workplace.rename(output)
    sync(output.parent)
    # Last: a run that is killed before this has either its checkpoints or its output.
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def error_number(error: OSError | SafetensorError) -> int | None:
    """The system's, as `errno` names it; safetensors says it in words only ("... (os error 28)")."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return None if found is None else int(found[1])
