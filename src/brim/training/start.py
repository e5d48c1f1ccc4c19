"""From names to a `Run`: prediction, weights, tokenizer and data, each checked before the next and before any step."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from brim.errors import ModelFileError
from brim.models import ModelSpec
from brim.models.weights import local_directory, tokenizer_directory
from brim.recipe import Recipe
from brim.report import Prediction
from brim.training.chat import CHATML
from brim.training.data import tokenize
from brim.training.dataset import DataSet
from brim.training.job import Run
from brim.training.ranks import ALONE, Ranks
from brim.training.rows import read_rows
from brim.units import Progress, no_progress


def prepare(
    recipe: Recipe,
    spec: ModelSpec,
    *,
    data: Path,
    eval_data: Path | None = None,
    output: Path,
    predicted: Prediction,
    device: str = "cpu",
    resume: bool = False,
    merge: bool = False,
    ranks: Ranks = ALONE,
    cap_bytes: int | None = None,
    progress: Progress = no_progress,
) -> Run:
    """Everything a run needs. Reads the data first: it is what most often is wrong, and fast to see.

    Progress is that of the weights. Raises DataError, ModelFileError and what `local_directory` raises.
    """
    rows = read_rows(data)
    held_rows = None if eval_data is None else read_rows(eval_data)
    weights = local_directory(spec, progress=progress)
    tokenizer = load_tokenizer(weights, recipe)
    return Run(
        recipe=recipe,
        spec=spec,
        weights=weights,
        tokenizer=tokenizer,
        data=tokenize(rows, tokenizer, recipe),
        held=None if held_rows is None else tokenize(held_rows, tokenizer, recipe),
        output=output,
        predicted=predicted,
        device=device,
        resume=resume,
        merge=merge,
        ranks=ranks,
        cap_bytes=cap_bytes,
    )


def prepare_shown(
    recipe: Recipe, spec: ModelSpec, data: Path, *, progress: Progress = no_progress
) -> tuple[DataSet, Any]:
    """(the data in the recipe's shape, the tokenizer): what is to be looked at before a run. Raises as `prepare`."""
    rows = read_rows(data)
    tokenizer = load_tokenizer(tokenizer_directory(spec, progress=progress), recipe)
    return tokenize(rows, tokenizer, recipe), tokenizer


def load_tokenizer(directory: Path, recipe: Recipe | None = None) -> Any:
    """The tokenizer beside the weights, with the chat template that the recipe asks for. Raises ModelFileError where
    there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{directory} has no tokenizer that transformers can read: {error}") from None
    if recipe is not None and recipe.training.chat_template == "chatml":
        tokenizer.chat_template = CHATML  # saved with it: who uses the model writes as it was taught
    return tokenizer
