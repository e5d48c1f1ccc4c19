"""torchao's QAT of a workload of ours: the same weights, rows, steps and optimizer, its own rounding in every layer.

Its default makes scales anew of the largest weight at every step; range learning starts from those and learns them, as
autograd finds their gradients. What its conversion would write is what its layers use: they are measured as they are.
"""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, initialize_fake_quantizers

from brim.numerics.granularity import PerGroup, PerTensor, parse_granularity
from brim.recipe import Recipe
from brim.training.build import Workload
from brim.training.linears import inner_linears
from brim.training.optimizer import Stepper


def takes(recipe: Recipe) -> bool:
    """Whether torchao has such weights: of one scale a tensor it has none."""
    return not isinstance(parse_granularity(recipe.qat.granularity), PerTensor)


def rounded(workload: Workload, recipe: Recipe, *, learned: bool) -> Workload:
    """A plain workload, its inner linear layers torchao's; `learned`: with range learning."""
    match parse_granularity(recipe.qat.granularity):
        case PerGroup(size):
            shared: dict[str, Any] = {"group_size": size}
        case _:
            shared = {"granularity": "per_channel"}
    config = IntxFakeQuantizeConfig(
        getattr(torch, recipe.qat.format), is_symmetric=True, is_dynamic=not learned, range_learning=learned, **shared
    )
    is_inner = inner_linears(workload.base, recipe.task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(
            workload.base,
            QATConfig(weight_config=config, step="prepare"),
            filter_fn=lambda module, name: isinstance(module, nn.Linear) and is_inner(name, module),
        )
        if learned:
            initialize_fake_quantizers(workload.base, (torch.zeros(1, 2, dtype=torch.long),))
    parameters = [parameter for parameter in workload.model.parameters() if parameter.requires_grad]
    scales = [p for name, p in workload.model.named_parameters() if name.endswith("fake_quantizer.scale")]
    assert bool(scales) == learned
    optimizer = Stepper(
        parameters, recipe.optimizer, fp32_master=False, undecayed=scales, undecayed_rate=recipe.qat.scale_rate
    )
    return replace(workload, optimizer=optimizer)
