"""Time that a model takes to read a prompt and write: a roofline. No torch."""

from brim.hardware.device import Device
from brim.models.spec import ModelSpec
from brim.recipe import Recipe


def writing_time(
    spec: ModelSpec, recipe: Recipe, *, new_tokens: int, weight_bytes: int, cache_bytes: int, device: Device
) -> float:
    """Seconds to read the recipe's batch and to write `new_tokens` after each row.

    Reading is bound by products, 2 FLOPs a parameter and token; writing by the bandwidth: each token reads all weights
    and the cache. Ignored: attention's own products, launching operators, experts that are not asked. A lower bound.
    """
    tokens = recipe.micro_batch_size * recipe.seq_len
    reading = 2 * spec.num_parameters * tokens / device.flops["fp32" if recipe.precision.weights == "fp32" else "bf16"]
    return reading + new_tokens * (weight_bytes + cache_bytes) / device.bandwidth_bytes_per_s
