"""The teacher of `qat.teacher_top`: the model as it was read, asked once about each row before the first step.

What it says lies in two files beside the run's checkpoints, which go when the run is done, and is mapped, not held. A
run that goes on finds them, or makes the same again: its layers have their first weights until a checkpoint is read.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from brim.errors import RecipeError
from brim.layers.soft_labels import SoftLabels
from brim.memory import owners
from brim.publish import sync
from brim.training.build import Workload
from brim.training.dataset import DataSet
from brim.training.fake_quantized import unrounded

_KINDS = {"ids": torch.int32, "probabilities": torch.int16}
"""Bytes of BF16 are held as those of INT16, which numpy knows."""
TEACHER_BYTES = sum(dtype.itemsize for dtype in _KINDS.values())
"""Of each likely successor of a token."""


def taught(workload: Workload, data: DataSet, place: Path) -> DataSet:
    """The data with what the workload's model, not yet trained, says of the rows that the run will read."""
    recipe, count = workload.recipe, workload.recipe.qat.teacher_top
    if count > workload.base.config.get_text_config().vocab_size:
        raise RecipeError(
            f"qat.teacher_top = {count} is more than the model has tokens; "
            f"nearest: qat.teacher_top = {workload.base.config.get_text_config().vocab_size}"
        )
    paths = [place / f"teacher-{data.fingerprint[:16]}-{count}.{kind}" for kind in _KINDS]
    shape = (*data.input_ids.shape, count)
    if not all(path.exists() for path in paths):
        place.mkdir(parents=True, exist_ok=True)
        steps = range(data.steps(recipe))
        _write(workload, data, sorted({row for step in steps for row in data.step_rows(recipe, step)}), paths)
        sync(place)
    ids, probabilities = (
        torch.from_numpy(np.memmap(path, dtype=str(dtype).removeprefix("torch."), mode="c", shape=shape))
        for path, dtype in zip(paths, _KINDS.values(), strict=True)
    )
    return replace(data, soft=SoftLabels(ids, probabilities.view(torch.bfloat16)))


def _write(workload: Workload, data: DataSet, rows: Sequence[int], paths: Sequence[Path]) -> None:
    """Both files, under their names only when they are whole; rows that are never read stay holes."""
    parts = [path.with_name(f"{path.name}.part") for path in paths]
    with parts[0].open("wb") as ids, parts[1].open("wb") as probabilities:
        for row in rows:
            said = _asked(workload, data, row)
            for file, tensor in ((ids, said.ids_NK), (probabilities, said.probabilities_NK.view(torch.int16))):
                row_bytes = tensor.numel() * tensor.element_size()
                file.truncate(len(data) * row_bytes)
                file.seek(row * row_bytes)
                file.write(tensor.cpu().contiguous().numpy().tobytes())
    for part, path in zip(parts, paths, strict=True):
        part.rename(path)


@torch.no_grad()
def _asked(workload: Workload, data: DataSet, row: int) -> SoftLabels:
    """One row at a time: no step takes less."""
    named = {"input_ids": data.input_ids, "attention_mask": data.attention_mask, "position_ids": data.position_ids}
    inputs = {name: tensor[row : row + 1].to(workload.device) for name, tensor in named.items() if tensor is not None}
    workload.model.eval()
    try:
        with unrounded(workload.base), workload.kernels(), workload.autocast():
            return workload.head.taught(workload.model, inputs, workload.recipe.qat.teacher_top)
    finally:
        workload.model.train()
        owners.switch("workspace")
