"""`qat.start = "calibrated"`: scales and weights to begin with, by what flows through them on the run's rows.

Block after block, as `brim quantize --scales calibrated` does (checkpoints/calibrate.py): scales have the least error
weighted by each input's mean square, and a weight takes what was lost by those that were rounded before it (GPTQ's
error feedback). Training begins at the weight that was rounded, not at its code, so that a small step can still turn it
to the next one. Later blocks see what earlier ones give when they are rounded.

Shapes: N sequences, T tokens, R rows, K inputs, S scales of a row.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from brim.checkpoints.calibrate import SEQUENCE_TOKENS, Moments, block_bytes
from brim.checkpoints.decoder import BlockwiseDecoder, HiddenStates
from brim.checkpoints.targets import TOKENS
from brim.errors import DoesNotFitError
from brim.layers.fake_quantize import FakeQuantizedLinear
from brim.models.directory import stored_tensors
from brim.models.spec import ModelSpec
from brim.numerics.feedback import fed_weight
from brim.numerics.scales import least_error_scale
from brim.recipe import Recipe
from brim.training.build import Workload
from brim.training.dataset import DataSet
from brim.training.parts import part_of
from brim.units import format_bytes


def calibrate_start(
    workload: Workload, spec: ModelSpec, weights: Path, data: DataSet, *, scratch: Path, room_bytes: int | None = None
) -> None:
    """Scales and weights of the fake-quantized layers, before the first step. `weights` is the directory that the
    workload was built of; hidden states are in the file `scratch` while this lasts. The same come out each time.

    Raises DoesNotFitError where a block with what is gathered of it takes more than `room_bytes`.
    """
    decoder = BlockwiseDecoder(spec, {tensor.spec.name: tensor for tensor in stored_tensors(weights)})
    tokens_NT = first_tokens(data, workload.recipe, longest=decoder.max_tokens)
    need_bytes = max(block_bytes(block, tokens=tokens_NT.shape[1]) for block in decoder.blocks)
    if room_bytes is not None and need_bytes > room_bytes:
        raise DoesNotFitError(
            f'qat.start = "calibrated" holds a block with what it gathers, {format_bytes(need_bytes)} beside the '
            f'model, and {format_bytes(room_bytes)} are left; allow more with --memory, or take qat.start = "absmax"'
        )
    layers = {name: module for name, module in workload.base.named_modules() if isinstance(module, FakeQuantizedLinear)}
    scratch.unlink(missing_ok=True)  # of a run that was killed
    _begin(decoder, tokens_NT, layers, scratch)
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


# not in inference mode: what it makes could not be trained
@torch.no_grad()
def _begin(
    decoder: BlockwiseDecoder, tokens_NT: Tensor, layers: Mapping[str, FakeQuantizedLinear], scratch: Path
) -> None:
    count = len(tokens_NT)
    with HiddenStates(scratch, tokens=tokens_NT.shape[1], width=decoder.hidden_size) as states:
        for number, tokens_T in enumerate(tokens_NT):
            states[number] = decoder.embedded(tokens_T)
        for block in decoder.blocks:
            with decoder.loaded(block):
                linears = {
                    decoder.own_name(block, name): module
                    for name, module in block.named_modules()
                    if isinstance(module, nn.Linear)
                }
                with Moments(linears) as moments:
                    for number in range(count):
                        decoder.run(block, states[number])
                for name in moments.names:
                    _choose(layers[name], linears[name].weight.data, moments.of(name) / tokens_NT.numel())
                    linears[name].weight.data.copy_(layers[name].decoded())
                del moments
                for number in range(count):
                    states[number] = decoder.run(block, states[number])


def _choose(layer: FakeQuantizedLinear, weight_RK: Tensor, power_KK: Tensor) -> None:
    grid, codes = layer.grid, (layer.grid.low, layer.grid.high)
    importance = grid.blocks(power_KK.diagonal().expand_as(weight_RK))
    scale_RS = least_error_scale(grid.blocks(weight_RK), codes=codes, dtype=torch.float32, importance=importance)
    part_of(layer.scale).copy_(scale_RS.squeeze(-1))
    # as it will be read, in the format that a checkpoint holds it in
    stored = layer.stored_scale(layer.weight.dtype).float().to(weight_RK.device)
    of_rows = stored.expand(len(weight_RK), -1)
    part_of(layer.weight).copy_(fed_weight(weight_RK, of_rows, power_KK, codes=codes))
