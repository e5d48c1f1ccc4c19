"""Recipe -> model and optimizer, in one order, on any device, fake or real."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from brim.checkpoints.decoder import FAMILIES
from brim.errors import RecipeError
from brim.memory import owners
from brim.models import ModelSpec
from brim.models.skeleton import DTYPES, attention_kernels, load, skeleton
from brim.recipe import Recipe
from brim.training.adapters import add_lora
from brim.training.attention_blocks import alter_attention, multiply_angles
from brim.training.checkpointing import checkpoint_blocks
from brim.training.copies import Shares
from brim.training.fake_quantized import quantize_fake, scales_of
from brim.training.fused_gate import fuse_gates
from brim.training.fused_norm import fuse_norms
from brim.training.head import LossModule, OutputHead
from brim.training.litgpt import Litgpt
from brim.training.litgpt_lora import add_litgpt_lora
from brim.training.loss_scale import LossScale
from brim.training.matrices import divide_matrices
from brim.training.offload import offload_blocks
from brim.training.optimizer import Stepper
from brim.training.packed_base import PackedBase, cast_norms
from brim.training.packing import check_takes_positions
from brim.training.ranks import ALONE, Ranks
from brim.training.sharding import casts_when_gathered, shard
from brim.training.stored_base import StoredBase, stored_base

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one recipe trains."""

    recipe: Recipe
    model: nn.Module
    """The model as it is called: with adapters when the method has them."""
    base: PreTrainedModel
    """The same model without the adapters' wrapper."""
    head: OutputHead
    loss: nn.Module
    """A `LossModule` around the model, sharded as the recipe says."""
    optimizer: Stepper
    loss_scale: LossScale | None
    """Where backward runs in FP16."""
    device: torch.device
    ranks: Ranks
    summed: list[nn.Parameter]
    """Of which each rank that shares the matrices finds only a part of the gradient."""

    def kernels(self) -> AbstractContextManager[object]:
        """What forward and backward may run in: FlashAttention alone, when the recipe asks for it."""
        return _flash_alone() if self.recipe.memory.attention == "flash" else nullcontext()

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[object]:
        """DDP sums gradients over the ranks in the last micro-batch alone: summed twice, earlier ones would count
        more. Sharded devices do, too, where the library's code does."""
        if isinstance(self.loss, DistributedDataParallel) and not is_last:
            return self.loss.no_sync()
        if isinstance(self.loss, FSDPModule) and self.recipe.library.accumulation == "whole":
            self.loss.set_requires_gradient_sync(is_last)
        return nullcontext()

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def autocast(self) -> AbstractContextManager[object]:
        """16-bit matmuls over FP32 weights, when the recipe asks for them."""
        compute, fp32_norms = self.recipe.precision.compute, self.recipe.library.frozen == "fp32-norms"
        asked = fp32_norms or self.recipe.library.autocast
        mixed = compute != "fp32" and (self.recipe.plain_format == "fp32" or asked)
        if mixed and not casts_when_gathered(self.recipe):
            return torch.autocast(self.device.type, dtype=DTYPES[compute])
        return nullcontext()


def build(
    recipe: Recipe, spec: ModelSpec, *, weights: Path | None = None, device: str = "cpu", ranks: Ranks = ALONE
) -> Workload:
    """A recipe's model and optimizer on a device; inside a fake mode, fake ones.

    `weights` is a directory in Hugging Face form; without it the weights are random. The order: weights in their
    stored format, packed one by one as they come -> device -> fake quantization (it takes the weights over) -> adapters
    (they take the base's format and place) -> tensor parallelism (adapters follow their layer) -> checkpointing (it
    must see the final blocks) -> offloading (of what checkpointing leaves to keep) -> sharding (it must see all that is
    to be divided) -> optimizer (it must see the final parameters).

    Raises RecipeError when the recipe does not go with the model.
    """
    check_recipe_fits_model(recipe, spec)
    owners.switch("weights")
    place = torch.device(device)
    with owners.on_host() if recipe.memory.offloads_weights else nullcontext():
        divides_weights = recipe.parallel.divides_weights and ranks.data_count > 1
        divided = None if ranks.mesh is None or recipe.parallel.tensor == 1 else ranks.mesh["tensor"]
        # who divides them takes each to its place: whole, they need not fit there
        home = _CPU if recipe.memory.offloads_weights or divides_weights or divided is not None else place
        mapped = divides_weights and divided is None
        base = base_model(recipe, spec, weights=weights, device=home, mapped=mapped)
        model = _altered(base, recipe)
        summed = [] if divided is None else divide_matrices(base, recipe, divided)
        held = recipe.library.sharding == "fsdp1" and recipe.adapts and recipe.parallel.sharding != "none"
        reentrant = recipe.library.checkpoints == "reentrant"
        checkpoint_blocks(base, recipe.memory.activation_checkpointing, reentrant=reentrant, held=held)
        if divided is not None and not divides_weights:
            base.to(place)  # what each has whole
        at_home = offload_blocks(base, recipe.memory, place, gathered=divides_weights)
        model.train()
        head = _head(base, recipe)
        loss = shard(LossModule(model, head), recipe, ranks)
    if divides_weights and recipe.memory.offloads_weights:
        at_home = list(model.parameters())
    owners.claim("weights", [*model.parameters(), *model.buffers()])
    owners.switch("optimizer")
    optimizer = _stepper(model, recipe, ranks, at_home)
    owners.claim("optimizer", optimizer.tensors())
    owners.switch("workspace")
    return Workload(
        recipe=recipe,
        model=model,
        base=base,
        head=head,
        loss=loss,
        optimizer=optimizer,
        loss_scale=LossScale() if recipe.precision.compute == "fp16" else None,
        device=place,
        ranks=ranks,
        summed=[parameter for module in summed for parameter in module.parameters() if parameter.requires_grad],
    )


def _head(base: PreTrainedModel, recipe: Recipe) -> OutputHead:
    return OutputHead(
        base,
        task=recipe.task,
        chunked=recipe.memory.loss == "chunked",
        library=recipe.library,
        teacher_share=recipe.qat.teacher_share,
    )


def _altered(base: PreTrainedModel, recipe: Recipe) -> nn.Module:
    """The model as the recipe trains it: its layers replaced, adapters added."""
    base.config.use_cache = False
    if recipe.task == "sequence-classification" and base.config.pad_token_id is None:
        base.config.pad_token_id = 0  # some look for it, to find each row's last token; data brings its own
    if recipe.precision.packed and recipe.library.frozen == "fp32-norms":
        cast_norms(base)
    if recipe.training.packing:
        check_takes_positions(base)
    if recipe.library.norm == "fused":
        fuse_norms(base)
    if recipe.library.angles == "product":
        multiply_angles(base)
    if recipe.library.rotary == "in-place" or recipe.library.heads == "repeated":
        in_place, repeated = recipe.library.rotary == "in-place", recipe.library.heads == "repeated"
        alter_attention(base, in_place=in_place, repeated=repeated)
    if recipe.library.activation == "fused":
        fuse_gates(base)
    if recipe.method == "qat":
        quantize_fake(base, recipe)
    if recipe.adapts and isinstance(base, Litgpt):
        add_litgpt_lora(base, recipe.lora)
        return base
    return add_lora(base, recipe) if recipe.adapts else base


def _stepper(model: nn.Module, recipe: Recipe, ranks: Ranks, at_home: list[nn.Parameter]) -> Stepper:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    divides_states = recipe.parallel.sharding == "zero1" and ranks.data_count > 1
    return Stepper(
        trained,
        recipe.optimizer,
        fp32_master=recipe.precision.master == "fp32" and recipe.plain_format != "fp32",
        fused=recipe.library.adamw == "fused",
        undecayed=scales_of(model),
        undecayed_rate=recipe.qat.scale_rate,
        on_host=recipe.memory.offloads_optimizer,
        at_home=at_home,
        shares=Shares(trained, ranks) if divides_states else None,
    )


@contextmanager
def _flash_alone() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        try:
            yield
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise RecipeError(
                'memory.attention = "flash" cannot run: FlashAttention takes no mask that is trained (T5\'s position '
                "bias); on a CPU no dropout of scores (GPT-2, BERT); on a GPU no mask at all (padded rows, sliding "
                'windows), and 16 bits from Ampere on; nearest: memory.attention = "sdpa"'
            ) from None


def check_recipe_fits_model(recipe: Recipe, spec: ModelSpec) -> None:
    """Raises RecipeError when task, attention or sequence length do not go with the model."""
    classifies = recipe.task == "sequence-classification" and not spec.is_encoder_decoder
    if recipe.task != spec.task and not classifies:
        raise RecipeError(f'task = "{recipe.task}" does not go with {spec.name}; nearest: task = "{spec.task}"')
    if recipe.calibrates and spec.model_type not in FAMILIES:
        raise RecipeError(
            f'qat.start = "calibrated" runs decoders block by block, of {", ".join(FAMILIES)}, and {spec.name} is '
            f'{spec.model_type}; nearest: qat.start = "absmax"'
        )
    kernels = attention_kernels(spec, task=recipe.task)
    if recipe.library.model == "transformers" and _transformers_name(recipe.memory.attention) not in kernels:
        raise RecipeError(
            f'memory.attention = "{recipe.memory.attention}" cannot run: transformers has none for the family '
            f'{spec.model_type!r}; nearest: memory.attention = "{kernels[0]}"'
        )
    positions = spec.num_positions
    if positions and not spec.is_encoder_decoder and recipe.seq_len > positions:
        raise RecipeError(
            f"seq_len = {recipe.seq_len} is past the {positions} positions that {spec.name} knows; "
            f"nearest: seq_len = {positions}"
        )


def _transformers_name(attention: str) -> str:
    """torch's own FlashAttention is one of the kernels that `sdpa` chooses from; `Workload.kernels` leaves it alone."""
    return "sdpa" if attention == "flash" else attention


def _packer(recipe: Recipe, spec: ModelSpec, *, rehearsed: bool) -> PackedBase | StoredBase | None:
    """What packs the base, or takes it as its files hold it."""
    if not recipe.precision.packed:
        return None
    return stored_base(recipe, spec, rehearsed=rehearsed) or PackedBase(recipe)


def base_model(
    recipe: Recipe,
    spec: ModelSpec,
    *,
    weights: Path | None = None,
    device: torch.device = _CPU,
    mapped: bool = False,
) -> PreTrainedModel:
    """The model in the recipe's stored format, as transformers makes it: trained or asked to write.

    `mapped`: its weights may stay in their files until parts of them are taken.
    """
    dtype, attention, task = recipe.plain_format, _transformers_name(recipe.memory.attention), recipe.task
    swap = _packer(recipe, spec, rehearsed=weights is None)
    num_labels = recipe.num_labels if task == "sequence-classification" else None
    if recipe.library.model == "litgpt" and weights is not None:
        raise RecipeError(
            f'library.model = "litgpt" has random weights alone, and {spec.name} is to be read; '
            'nearest: library.model = "transformers"'
        )
    if weights is None:
        written = Litgpt if recipe.library.model == "litgpt" else None
        with device:
            return skeleton(
                spec, dtype=dtype, attention=attention, task=task, num_labels=num_labels, swap=swap, written=written
            )
    model = load(
        spec, weights, dtype=dtype, attention=attention, task=task, num_labels=num_labels, swap=swap, mapped=mapped
    )
    return model if device.type == "cpu" else model.to(device)
