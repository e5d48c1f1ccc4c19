"""What is asked of a model that writes: beside a recipe, all that decides the memory of inference."""

from dataclasses import dataclass
from typing import Literal

from brim.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """What is asked of a model: rows of a prompt, and tokens to write after each."""

    batch_size: int = 1
    context: int
    """Tokens of a row that the model reads first."""
    new_tokens: int
    logits: Literal["last", "all"] = "last"
    """Of which of the prompt's tokens: generation needs the last one's, a plain forward makes all."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "context", "new_tokens"):
            if (value := getattr(self, name)) < 1:
                raise UsageError(f"{name} {value} is less than 1")
