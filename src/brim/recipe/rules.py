"""What a recipe may say: ranges, combinations that run, and settings without effect."""

from typing import TYPE_CHECKING, Any

from brim.errors import RecipeError, UsageError
from brim.numerics.granularity import parse_granularity
from brim.recipe.sections import Lora, Qat

if TYPE_CHECKING:
    from brim.recipe.recipe import Recipe

_AT_LEAST = {
    "seq_len": 2, "target_seq_len": 0, "num_labels": 2, "micro_batch_size": 1, "grad_accumulation": 1,
    "training.epochs": 1, "training.max_steps": 0, "training.warmup_steps": 0, "training.save_every": 0,
    "training.evaluate_every": 0, "training.seed": 0,
    "qat.teacher_top": 0, "lora.rank": 1, "lora.alpha": 1, "precision.group_size": 8,
    "parallel.nodes": 1, "parallel.devices_per_node": 1, "parallel.tensor": 1, "parallel.pipeline": 1,
    "optimizer.weight_decay": 0, "optimizer.max_grad_norm": 0,
}  # fmt: skip


def check_ranges(recipe: "Recipe") -> None:
    for key, least in _AT_LEAST.items():
        value: Any = recipe
        for part in key.split("."):
            value = getattr(value, part)
        if not least <= value < 2**40:
            raise RecipeError(f"{key} = {value} is out of range; the least is {least}")
    if not 0 < recipe.optimizer.learning_rate < 1:
        raise RecipeError(f"optimizer.learning_rate = {recipe.optimizer.learning_rate} is not between 0 and 1")
    if not 0 <= recipe.qat.teacher_share <= 1:
        raise RecipeError(f"qat.teacher_share = {recipe.qat.teacher_share} is out of range; it is a share, from 0 to 1")
    if not 0 <= recipe.qat.exact_share < 1:
        raise RecipeError(f"qat.exact_share = {recipe.qat.exact_share} is out of range; it is from 0 to below 1")
    if recipe.qat.exact_share and recipe.qat.train != "all":
        raise RecipeError(
            f'qat.exact_share = {recipe.qat.exact_share} trains weights, and qat.train is "{recipe.qat.train}"; '
            "nearest: qat.exact_share = 0"
        )
    if not 0 <= recipe.qat.scale_rate < 1000:
        raise RecipeError(f"qat.scale_rate = {recipe.qat.scale_rate} is out of range; the least is 0")
    if not 0 <= recipe.lora.dropout < 1:
        raise RecipeError(f"lora.dropout = {recipe.lora.dropout} is out of range; it is a share, from 0 to below 1")
    try:
        parse_granularity(recipe.qat.granularity)
    except UsageError as error:
        raise RecipeError(f"qat.granularity: {error}") from None
    if not recipe.lora.targets:
        raise RecipeError('lora.targets is empty; name modules, or write ["all-linear"]')


# What this version can run. A row: the key, the values that run, the nearest value to one that does not, and why.
_RUNS: tuple[tuple[str, frozenset[object], str, str], ...] = (
    ("parallel.pipeline", frozenset({1}), "1", "stages are not built"),
)


def check_runs(recipe: "Recipe") -> None:
    if "fp16" in (recipe.precision.weights, recipe.precision.compute) and recipe.task == "seq2seq-lm":
        raise RecipeError(
            "FP16 cannot train T5-like models: their feed-forward outputs pass 65504, FP16's largest number, and turn "
            'into Inf; nearest: precision.weights = "bf16", precision.compute = "bf16"'
        )
    for key, runnable, nearest, why in _RUNS:
        value: Any = recipe
        for part in key.split("."):
            value = getattr(value, part)
        if value not in runnable:
            raise RecipeError(f"{key} = {value} cannot run in this version ({why}); nearest: {key} = {nearest}")
    if recipe.training.packing and recipe.task != "causal-lm":
        raise RecipeError(
            f'training.packing = true is for texts that are read from left to right, and task = "{recipe.task}" is '
            "not one of those; nearest: training.packing = false"
        )
    _check_setbacks(recipe)
    _check_in_backward(recipe)
    _check_fp16(recipe)
    _check_packed(recipe)
    _check_dora(recipe)
    _check_qat(recipe)
    _check_rounding(recipe)
    _check_parallel(recipe)
    _check_offload(recipe)
    library = recipe.library
    if library.model == "litgpt" and (recipe.training.packing or recipe.method == "qat" or recipe.parallel.tensor > 1):
        raise RecipeError(
            'library.model = "litgpt" trains whole rows, without packing, qat or tensor parallelism; '
            'nearest: library.model = "transformers"'
        )
    if library.model == "litgpt" and recipe.task != "causal-lm":
        raise RecipeError(
            f'library.model = "litgpt" is a causal language model, and task = "{recipe.task}"; '
            'nearest: library.model = "transformers"'
        )
    if library.loss != "brim" and (recipe.memory.loss == "chunked" or recipe.task != "causal-lm"):
        raise RecipeError(
            f'library.loss = "{library.loss}" is a full loss of causal language models; nearest: library.loss = "brim"'
        )
    foreach = recipe.optimizer.name == "adamw" and library.adamw == "foreach"
    if foreach and recipe.memory.offloads_optimizer:
        raise RecipeError(
            'library.adamw = "foreach" steps all parameters at once, '
            f'memory.offload = "{recipe.memory.offload}" one by one on the host; nearest: library.adamw = "fused"'
        )
    if foreach and recipe.precision.master == "fp32" and recipe.plain_format != "fp32":
        raise RecipeError(
            'library.adamw = "foreach" steps all parameters at once, precision.master = "fp32" one by one; '
            'nearest: library.adamw = "fused"'
        )
    weights, compute = recipe.precision.weights, recipe.precision.compute
    if weights != "fp32" and compute != weights and not recipe.precision.packed:
        raise RecipeError(
            f'precision.compute = "{compute}" cannot run over precision.weights = "{weights}": a matmul runs in its '
            f'weights\' format, or below FP32; nearest: precision.compute = "{weights}", or precision.weights = "fp32"'
        )


def _check_setbacks(recipe: "Recipe") -> None:
    if recipe.training.on_spike != "rollback":
        return
    if not recipe.training.save_every:
        raise RecipeError(
            'training.on_spike = "rollback" goes back to a checkpoint, and training.save_every = 0 writes none; '
            "nearest: training.save_every = 100"
        )
    if recipe.has_teacher:
        raise RecipeError(
            'training.on_spike = "rollback" reads other rows than the teacher was asked about; '
            'nearest: training.on_spike = "stop"'
        )


def _check_offload(recipe: "Recipe") -> None:
    memory, parallel = recipe.memory, recipe.parallel
    if memory.offload == "none":
        return
    if memory.offloads_activations and memory.activation_checkpointing == "selective":
        raise RecipeError(
            f'memory.offload = "{memory.offload}" does not reach what memory.activation_checkpointing = "selective" '
            'keeps, which is not in autograd\'s hands; nearest: memory.activation_checkpointing = "full"'
        )
    if parallel.tensor > 1 or parallel.copies_weights:
        shared = f"parallel.tensor = {parallel.tensor}" if parallel.tensor > 1 else f'sharding = "{parallel.sharding}"'
        raise RecipeError(
            f'memory.offload = "{memory.offload}" steps on each host what that device alone has, and {shared} gives '
            'several the same; nearest: parallel.sharding = "zero2", parallel.tensor = 1'
        )
    if memory.offloads_weights and recipe.library.packed == "bitsandbytes-0.42":
        raise RecipeError(
            f'memory.offload = "{memory.offload}" is not seen by library.packed = "bitsandbytes-0.42", whose backward '
            'reads the layer itself; nearest: memory.offload = "none"'
        )
    if memory.offloads_weights and recipe.precision.compute == "fp16":
        raise RecipeError(
            f'memory.offload = "{memory.offload}" has gradients in two memories, and the loss scale of FP16 asks for '
            'their norm in FP32 before any is stepped; nearest: precision.weights = "bf16", precision.compute = "bf16"'
        )


def _check_fp16(recipe: "Recipe") -> None:
    if recipe.precision.compute != "fp16":
        return
    if recipe.optimizer.in_backward:
        raise RecipeError(
            "optimizer.in_backward = true steps before it is known whether a gradient has overflowed FP16; "
            'nearest: precision.weights = "bf16", precision.compute = "bf16"'
        )
    fp32_adapters = recipe.adapts and recipe.library.adapters == "fp32"
    if recipe.plain_format == "fp16" and recipe.precision.master == "none" and not fp32_adapters:
        raise RecipeError(
            "trained weights and optimizer states in FP16 lose every update and second moment below 6e-8, its "
            'smallest number; nearest: precision.master = "fp32", or precision.weights = "bf16" and '
            'precision.compute = "bf16"'
        )


def _check_packed(recipe: "Recipe") -> None:
    weights, packed = recipe.precision.weights, recipe.precision.packed
    if recipe.method == "qlora" and not packed:
        raise RecipeError(
            f'method = "qlora" adapts a packed base, and precision.weights = "{weights}" is not packed; '
            'nearest: precision.weights = "nf4", or method = "lora"'
        )
    if packed and recipe.method != "qlora":
        raise RecipeError(
            f'precision.weights = "{weights}" is a format of frozen weights (codes take no gradient), and method = '
            f'"{recipe.method}" is for weights that matmuls run in; nearest: method = "qlora"'
        )


def _check_rounding(recipe: "Recipe") -> None:
    if recipe.optimizer.rounding == "nearest":
        return
    if recipe.optimizer.name not in ("adamw", "adamw8bit"):
        raise RecipeError(
            f'optimizer.rounding = "stochastic" is written for AdamW, and optimizer.name = "{recipe.optimizer.name}"; '
            'nearest: optimizer.name = "adamw"'
        )
    if recipe.parallel.sharding not in ("none", "zero2", "zero3") or recipe.parallel.tensor > 1:
        raise RecipeError(
            'optimizer.rounding = "stochastic" rounds by chance, and devices that have copies of a weight would each '
            'round it otherwise; nearest: optimizer.rounding = "nearest", or parallel.sharding = "zero3" alone'
        )


def _check_dora(recipe: "Recipe") -> None:
    if not (recipe.adapts and recipe.lora.dora):
        return
    if recipe.precision.packed:
        raise RecipeError(
            "lora.dora = true reads whole weights to know their lengths, and a packed base has none; nearest: "
            'lora.dora = false, or method = "lora" with precision.weights = "bf16"'
        )
    if recipe.parallel.divides_weights or recipe.parallel.tensor > 1:
        raise RecipeError(
            f'lora.dora = true reads whole weights, and parallel.sharding = "{recipe.parallel.sharding}", '
            f"parallel.tensor = {recipe.parallel.tensor} divide them; nearest: lora.dora = false"
        )


def _check_qat(recipe: "Recipe") -> None:
    lora = recipe.lora
    plain = recipe.task == "causal-lm" and recipe.library.loss == "brim" and recipe.parallel.devices == 1
    if recipe.has_teacher and not plain:
        raise RecipeError(
            f"qat.teacher_top = {recipe.qat.teacher_top} is of causal language models on one device, with Brim's own "
            "loss; nearest: qat.teacher_top = 0"
        )
    if recipe.calibrates and recipe.task != "causal-lm":
        raise RecipeError(
            f'qat.start = "calibrated" runs decoders alone, and task is "{recipe.task}"; nearest: qat.start = "absmax"'
        )
    if recipe.method == "qat" and recipe.qat.activations == "int8" and recipe.task == "seq2seq-lm":
        raise RecipeError(
            'qat.activations = "int8" is not read back for T5-like models: transformers looks for a plain weight where '
            'inputs are rounded; nearest: qat.activations = "none"'
        )
    if recipe.updates_rounded and (lora.dora or lora.dropout or lora.targets != ("all-linear",)):
        raise RecipeError(
            'qat.train = "adapters" adds its update to every weight before it is rounded, without lora.dora, '
            'lora.dropout or lora.targets; nearest: lora.dora = false, lora.dropout = 0, lora.targets = ["all-linear"]'
        )


def _check_in_backward(recipe: "Recipe") -> None:
    if not recipe.optimizer.in_backward:
        return
    if recipe.grad_accumulation > 1:
        raise RecipeError(
            f"optimizer.in_backward = true frees each gradient when it has come, grad_accumulation = "
            f"{recipe.grad_accumulation} adds up those of all micro-batches first; nearest: grad_accumulation = 1"
        )
    if recipe.optimizer.max_grad_norm > 0:
        raise RecipeError(
            f"optimizer.in_backward = true steps before all gradients are known, optimizer.max_grad_norm = "
            f"{recipe.optimizer.max_grad_norm} needs the norm of them all; nearest: optimizer.max_grad_norm = 0"
        )


def _check_parallel(recipe: "Recipe") -> None:
    parallel = recipe.parallel
    if parallel.devices % (parallel.tensor * parallel.pipeline):
        raise RecipeError(
            f"parallel.tensor = {parallel.tensor} x parallel.pipeline = {parallel.pipeline} do not divide the "
            f"{parallel.devices} devices; nearest: parallel.tensor = 1, parallel.pipeline = 1"
        )
    if parallel.data_ranks > 1 and parallel.sharding == "none":
        raise RecipeError(
            f'{parallel.data_ranks} devices see different rows, and parallel.sharding = "none" does not say what they '
            'share; nearest: parallel.sharding = "zero3"'
        )
    if parallel.sharding == "hsdp" and parallel.nodes == 1:
        raise RecipeError(
            'parallel.sharding = "hsdp" keeps a copy on each node, and there is one; nearest: parallel.sharding = '
            '"zero3"'
        )
    if (parallel.sharding != "none" or parallel.tensor > 1) and recipe.optimizer.in_backward:
        raise RecipeError(
            "optimizer.in_backward = true steps each weight before its gradient has come from the other devices; "
            "nearest: optimizer.in_backward = false"
        )
    if parallel.tensor > 1 and parallel.sharding not in ("none", "zero2", "zero3"):
        raise RecipeError(
            f"parallel.tensor = {parallel.tensor} divides matrices, and parallel.sharding = "
            f'"{parallel.sharding}" keeps copies of whole ones; nearest: parallel.tensor = 1'
        )
    if parallel.tensor > parallel.devices_per_node:
        raise RecipeError(
            f"parallel.tensor = {parallel.tensor} talks within each layer, and would leave a node of "
            f"{parallel.devices_per_node} devices; nearest: parallel.tensor = {parallel.devices_per_node}"
        )
    if parallel.divides_weights or parallel.tensor > 1:
        _check_divided(recipe)


def _check_divided(recipe: "Recipe") -> None:
    """What does not work on parts of tensors."""
    if recipe.optimizer.name == "adafactor":
        raise RecipeError(
            'optimizer.name = "adafactor" takes means over elements that are on different devices; '
            'nearest: optimizer.name = "adamw8bit"'
        )
    if recipe.method == "qat":
        raise RecipeError(
            'method = "qat" shares scales among elements that would be on different devices; nearest: method = "lora", '
            'precision.weights = "bf16"'
        )


def without_effect(recipe: "Recipe") -> list[str]:
    """Settings that change nothing in this recipe, each with why."""
    found = []
    if recipe.plain_format == "fp32" and recipe.precision.master == "fp32":
        found.append('precision.master = "fp32" has no effect: the weights are FP32 already')
    if recipe.optimizer.rounding == "stochastic" and (
        recipe.plain_format != "bf16" or recipe.precision.master == "fp32"
    ):
        found.append('optimizer.rounding = "stochastic" has no effect: no BF16 weight is updated')
    if not recipe.precision.double_quant and recipe.precision.weights != "nf4":
        found.append(f'precision.double_quant has no effect: precision.weights is "{recipe.precision.weights}"')
    if recipe.precision.group_size != 128 and recipe.precision.weights != "int4":
        found.append(f'precision.group_size has no effect: precision.weights is "{recipe.precision.weights}"')
    if recipe.library.packed != "brim" and recipe.precision.weights != "nf4":
        found.append(f'library.packed has no effect: precision.weights is "{recipe.precision.weights}"')
    if recipe.library.frozen != "compute" and not recipe.precision.packed:
        found.append(f'library.frozen has no effect: precision.weights is "{recipe.precision.weights}"')
    if not (recipe.adapts or recipe.updates_rounded) and recipe.lora != Lora():
        found.append(f'[lora] has no effect: method is "{recipe.method}"')
    if recipe.method != "qat" and recipe.qat != Qat():
        found.append(f'[qat] has no effect: method is "{recipe.method}"')
    if recipe.library.cross_entropy != "operators" and (
        recipe.library.loss == "brim" or recipe.library.has_litgpt_loss
    ):
        found.append(f'library.cross_entropy has no effect: library.loss is "{recipe.library.loss}"')
    if recipe.precision.compute == "fp32" and recipe.library.autocast:
        found.append('library.autocast has no effect: precision.compute is "fp32"')
    if recipe.library.cache != "none" and not recipe.library.loss.startswith("transformers"):
        found.append(f'library.cache has no effect: library.loss is "{recipe.library.loss}"')
    if recipe.optimizer.name != "adamw" and recipe.library.adamw != "fused":
        found.append(f'library.adamw has no effect: optimizer.name is "{recipe.optimizer.name}"')
    if recipe.parallel.sharding == "none" and recipe.library.sharding != "fsdp2":
        found.append('library.sharding has no effect: parallel.sharding is "none"')
    if recipe.library.adapter_units != "own" and not (recipe.adapts and recipe.library.sharding == "fsdp1"):
        found.append("library.adapter_units has no effect: no adapter is divided by FSDP1")
    divided = recipe.parallel.divides_weights and recipe.grad_accumulation > 1
    if recipe.library.accumulation == "whole" and not divided:
        found.append("library.accumulation has no effect: no micro-batch leaves a gradient of divided weights")
    if not recipe.adapts and recipe.library.adapters != "weights":
        found.append(f'library.adapters has no effect: method is "{recipe.method}"')
    if recipe.task != "seq2seq-lm" and recipe.target_seq_len:
        found.append(f'target_seq_len has no effect: task is "{recipe.task}"')
    if recipe.parallel.sharding != "none" and recipe.parallel.data_ranks == 1:
        found.append("parallel.sharding has no effect: one device sees all rows")
    if recipe.task != "sequence-classification" and recipe.num_labels != 2:
        found.append(f'num_labels has no effect: task is "{recipe.task}"')
    if recipe.task == "sequence-classification" and recipe.memory.loss == "chunked":
        found.append('memory.loss = "chunked" has no effect: a classifier has one row of logits a text')
    if recipe.task != "causal-lm":
        named = {"learn": "answers", "chat_template": "own", "pairs_as_chat": False}
        changed = [key for key, default in named.items() if getattr(recipe.training, key) != default]
        found += [f'training.{key} has no effect: task is "{recipe.task}"' for key in changed]
    if recipe.training.max_steps and recipe.training.warmup_steps >= recipe.training.max_steps:
        found.append("training.warmup_steps reaches past max_steps: the learning rate never gets to its full value")
    if recipe.training.max_steps and recipe.training.epochs != 1:
        found.append("training.epochs has no effect: training.max_steps says when the run ends")
    return found
