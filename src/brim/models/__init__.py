"""What a model is: `describe(source) -> ModelSpec` from config and file headers alone."""

from brim.models.describe import describe
from brim.models.spec import ModelSpec, TensorSpec

__all__ = ["ModelSpec", "TensorSpec", "describe"]
