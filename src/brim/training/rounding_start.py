"""The first scales of QAT where rounding begins later than the model is built, and `qat.start = "calibrated"`: weights,
too, chosen by what flows through them on the run's own first rows.

Block after block, as `brim quantize --scales calibrated` does (checkpoints/calibrate.py): scales have the least error
weighted by each input's mean square, and a weight takes what was lost by those that were rounded before it (GPTQ's
error feedback). Training goes on from the weight that was rounded, not from its code, so that a small step can still
turn it to the next one. Later blocks see what earlier ones give when they are rounded.

Shapes: N sequences, T tokens, R rows, K inputs, S scales of a row.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brim.checkpoints.calibrate import SEQUENCE_TOKENS, Moments, block_bytes
from brim.checkpoints.decoder import HiddenStates, run_block
from brim.checkpoints.targets import TOKENS
from brim.errors import DoesNotFitError
from brim.layers.fake_quantize import FakeQuantizedLinear, first_scale
from brim.numerics.feedback import fed_weight
from brim.numerics.scales import least_error_scale
from brim.recipe import Recipe
from brim.training.build import Workload
from brim.training.dataset import DataSet
from brim.training.fake_quantized import layers_of, set_exact
from brim.training.parts import part_of
from brim.units import format_bytes


def exact_steps(recipe: Recipe, steps: int) -> int:
    """How many of a run's steps, from its first on, round nothing."""
    return int(recipe.qat.exact_share * steps)


def set_rounding(
    workload: Workload,
    data: DataSet,
    step: int,
    steps: int,
    *,
    scratch: Path,
    room_bytes: Callable[[], int | None] = lambda: None,
) -> None:
    """Before step `step` (from 0): off in the first ones, if so asked; begun at the one after them."""
    recipe = workload.recipe
    first = exact_steps(recipe, steps)
    set_exact(workload.base, step < first)
    if step == first and recipe.qat.train == "all" and (first or recipe.calibrates):
        begin_rounding(workload, data, scratch=scratch, room_bytes=room_bytes())


@torch.no_grad()
def begin_rounding(workload: Workload, data: DataSet, *, scratch: Path, room_bytes: int | None = None) -> None:
    """Scales by the weights as they are now and, calibrated, the weights. `scratch` holds hidden states meanwhile. The
    same come out each time with the same number of threads.

    Raises DoesNotFitError where what is gathered of a block takes more than `room_bytes`.
    """
    start = workload.recipe.qat.start
    if start == "calibrated":
        scratch.unlink(missing_ok=True)  # of a run that was killed
        _calibrate(workload, data, scratch, room_bytes)
    else:
        for layer in layers_of(workload.base):
            part_of(layer.scale).copy_(first_scale(layer.weight, layer.grid, start))
    workload.optimizer.read_again()


def first_tokens(data: DataSet, recipe: Recipe, *, longest: int) -> Tensor:
    """(N, T) of what the run reads first: TOKENS in all, or as many as it will read."""
    rows: dict[int, None] = {}
    for step in range(data.steps(recipe)):
        rows |= dict.fromkeys(data.step_rows(recipe, step))
        if len(rows) * data.input_ids.shape[1] >= TOKENS:
            break
    chosen = torch.tensor(list(rows))
    ids = data.input_ids[chosen]
    real = torch.ones_like(ids) if data.attention_mask is None else data.attention_mask[chosen]
    ids = ids[real.bool()][:TOKENS]
    length = min(SEQUENCE_TOKENS, recipe.seq_len, longest, len(ids))
    return ids[: len(ids) // length * length].view(-1, length)


def _calibrate(workload: Workload, data: DataSet, scratch: Path, room_bytes: int | None) -> None:
    base: Any = workload.base.get_decoder()
    # within the window attention is plainly causal, for which no mask is needed
    longest = getattr(base.config, "sliding_window", None) or 2**30
    tokens_NT = first_tokens(data, workload.recipe, longest=longest)
    need_bytes = max(block_bytes(block, tokens=tokens_NT.shape[1]) for block in base.layers)
    if room_bytes is not None and need_bytes > room_bytes:
        raise DoesNotFitError(
            f'qat.start = "calibrated" gathers {format_bytes(need_bytes)} of a block beside the model, and '
            f'{format_bytes(room_bytes)} are left; allow more with --memory, or take qat.start = "absmax"'
        )
    workload.model.eval()
    try:
        with workload.kernels(), workload.autocast():
            _run(base, tokens_NT.to(workload.device), scratch)
    finally:
        workload.model.train()


def _run(base: Any, tokens_NT: Tensor, scratch: Path) -> None:
    count, dtype, device = len(tokens_NT), base.embed_tokens.weight.dtype, tokens_NT.device
    with HiddenStates(scratch, tokens=tokens_NT.shape[1], width=base.config.hidden_size) as states:

        def output(block: nn.Module, number: int) -> Tensor:
            return run_block(base, block, states[number].to(device, dtype)).float().cpu()

        for number, tokens_T in enumerate(tokens_NT):
            states[number] = base.embed_tokens(tokens_T[None]).float().cpu()
        for block in base.layers:
            layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, FakeQuantizedLinear)}
            for layer in layers.values():
                layer.exact = True
            with Moments(layers) as moments:
                for number in range(count):
                    output(block, number)
            for name in moments.names:
                _choose(layers[name], moments.of(name) / tokens_NT.numel())
            del moments
            for layer in layers.values():
                layer.exact = False
            for number in range(count):
                states[number] = output(block, number)


def _choose(layer: FakeQuantizedLinear, power_KK: Tensor) -> None:
    grid, weight_RK = layer.grid, layer.weight.float()
    power_KK = power_KK.to(weight_RK.device)  # offloaded weights are on the host
    codes = (grid.low, grid.high)
    importance = grid.blocks(power_KK.diagonal().expand_as(weight_RK))
    scale_RS = least_error_scale(grid.blocks(weight_RK), codes=codes, dtype=torch.float32, importance=importance)
    part_of(layer.scale).copy_(scale_RS.squeeze(-1))
    # as it will be read, in the format that a checkpoint holds it in
    of_rows = layer.stored_scale(layer.weight.dtype).float().expand(len(weight_RK), -1)
    part_of(layer.weight).copy_(fed_weight(weight_RK, of_rows, power_KK, codes=codes))
