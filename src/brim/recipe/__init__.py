"""`Recipe`: all that decides memory and speed; read from and written to TOML."""

from brim.recipe.recipe import Recipe
from brim.recipe.sections import Library, Lora, Memory, Method, Optimizer, Parallel, Precision, Qat, Task, Training
from brim.recipe.writing import Writing

__all__ = [
    "Library",
    "Lora",
    "Memory",
    "Method",
    "Optimizer",
    "Parallel",
    "Precision",
    "Qat",
    "Recipe",
    "Task",
    "Training",
    "Writing",
]
