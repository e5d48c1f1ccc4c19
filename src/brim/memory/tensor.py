"""What one of the devices that share each matrix holds: the same model with fewer heads and a narrower feed-forward.

By transformers' plans for these families (`training.matrices`): q, k, v, gate and up are divided by outputs, o and down
by inputs; what lies between them is divided with them, and the residual stream is whole. So are embedding and head
where they are one tensor or the loss is chunked; else their rows are divided, and each device gathers all logits.
"""

from dataclasses import replace

from brim.memory.anatomy import TABLE_RANKS, anatomy
from brim.models.spec import ModelSpec
from brim.recipe import Recipe

DIVIDED_FAMILIES = frozenset({
    "llama", "mistral", "smollm3", "granite", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
})  # fmt: skip
"""With a plan that divides outputs and inputs in turn (tests/cpu/test_tensor_closed_form.py asks transformers)."""


def can_divide(spec: ModelSpec, ranks: int) -> bool:
    """Whether so many devices can share each matrix: a whole number of heads each, and of keys' heads."""
    whole = all(size % ranks == 0 for size in (spec.num_heads, spec.num_kv_heads, spec.intermediate_size))
    return ranks == 1 or (spec.model_type in DIVIDED_FAMILIES and whole)


def whole_of(spec: ModelSpec, recipe: Recipe) -> tuple[ModelSpec, Recipe]:
    """A device's share of the model, and the recipe as groups of devices that each hold a whole of it would run it."""
    parallel = recipe.parallel
    if parallel.tensor == 1 or not can_divide(spec, parallel.tensor):
        return spec, recipe
    groups = replace(parallel, tensor=1, devices_per_node=max(1, parallel.devices_per_node // parallel.tensor))
    divides_tables = not spec.tied_head and recipe.memory.loss == "full"
    share = _share_of(spec, parallel.tensor, divides_tables=divides_tables)
    return share, replace(recipe, parallel=groups)


def _share_of(spec: ModelSpec, ranks: int, *, divides_tables: bool) -> ModelSpec:
    """The model as one of `ranks` devices has it."""
    config = {
        **spec.config,
        "head_dim": spec.head_dim,
        "num_attention_heads": spec.num_heads // ranks,
        "num_key_value_heads": spec.num_kv_heads // ranks,
        "intermediate_size": spec.intermediate_size // ranks,
        TABLE_RANKS: ranks if divides_tables else 1,
    }
    share = replace(spec, config=config, tensors=())
    return replace(share, num_parameters=anatomy(share).num_parameters)
