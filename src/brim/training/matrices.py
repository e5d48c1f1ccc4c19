"""Tensor parallelism: ranks that see the same rows and share each matrix, by transformers' plan for the family.

The plan names linear layers whose outputs are divided and those whose inputs are; transformers' own styles divide the
weights (as DTensors) and move what lies between. Adapters follow their layer: the second factor of one whose outputs
are divided, the first of one whose inputs are. Embedding and head stay whole where they are one tensor, or where the
chunked loss reads the head.
"""

import re

from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from brim.errors import RecipeError
from brim.recipe import Recipe

_SUMMED = "replicated_with_grad_allreduce"
_KNOWN = frozenset({
    "colwise", "rowwise", "colwise_gather_output", "rowwise_split_input", "embedding_rowwise", "packed_colwise",
    "packed_rowwise", _SUMMED,
})  # fmt: skip


def divide_matrices(base: PreTrainedModel, recipe: Recipe, mesh: DeviceMesh) -> list[nn.Module]:
    """Divide the model's matrices over the mesh, in place.

    Returns the modules of whose parameters' gradients each rank finds only its heads' part: they are to be summed.
    Raises RecipeError for a model that cannot be divided so.
    """
    plan = _plan(base, recipe)
    summed: list[nn.Module] = []
    for name, module in list(base.named_modules()):
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style == _SUMMED:
            # transformers' own hook sums what earlier micro-batches have left once more
            summed.append(module)
        elif style is not None:
            _divide(module, style, mesh)
    return summed


def _divide(module: nn.Module, style: str, mesh: DeviceMesh) -> None:
    if isinstance(module, LoraLayer):
        factors = module.lora_B if style.startswith("colwise") else module.lora_A
        for factor in factors.values():
            _divide(factor, style, mesh)
        _divide(module.get_base_layer(), style, mesh)
        return
    parallel = ALL_PARALLEL_STYLES[style]
    for name in list(module._parameters):
        parallel.shard_param(module, name, mesh)
    parallel.install_forward(module, mesh)


def _plan(base: PreTrainedModel, recipe: Recipe) -> dict[str, str]:
    plan, ranks = dict(base._tp_plan or {}), recipe.parallel.tensor
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or embedding.weight is head.weight or recipe.memory.loss == "chunked":
        plan = {name: style for name, style in plan.items() if "." in name and style != "embedding_rowwise"}
    family = base.config.model_type
    if not any(style.startswith("colwise") for name, style in plan.items() if "." in name):
        raise RecipeError(
            f"parallel.tensor = {ranks} cannot run: transformers has no plan of dividing {family!r}'s matrices; "
            'nearest: parallel.tensor = 1, parallel.sharding = "zero3"'
        )
    if strange := sorted(set(plan.values()) - _KNOWN):
        raise RecipeError(
            f"parallel.tensor = {ranks} cannot run: {family!r} would be divided by {', '.join(strange)}, which Brim "
            'does not know; nearest: parallel.tensor = 1, parallel.sharding = "zero3"'
        )
    _check_heads(base, ranks)
    return plan


def _check_heads(base: PreTrainedModel, ranks: int) -> None:
    config = base.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None) or ranks
        if heads % ranks:
            raise RecipeError(
                f"parallel.tensor = {ranks} does not divide {name} = {heads}; nearest: parallel.tensor = "
                f"{next(count for count in range(ranks, 0, -1) if heads % count == 0)}"
            )
