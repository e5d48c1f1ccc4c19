"""What several verbs share: the options of a recipe, and which recipe they mean."""

from pathlib import Path
from typing import Annotated

import typer

from brim.errors import RecipeError, UsageError
from brim.hardware import Device, find
from brim.hardware.detect import detect_host
from brim.hardware.rates import cpu_identity, kept_rates, quick_device
from brim.models import ModelSpec, describe
from brim.recipe import Recipe

Source = Annotated[
    str, typer.Argument(metavar="MODEL|RECIPE", help="A model's name, Hub id, directory or .gguf; or a recipe.toml.")
]
DeviceName = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
GpuName = Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="A GPU that need not be here, as a100.")]
Risk = Annotated[float, typer.Option(help="On a GPU: the share of published runs that may pass the upper bound.")]
Memory = Annotated[str | None, typer.Option(help="Use at most this much, as 24GiB.")]
Method = Annotated[str | None, typer.Option(help="full, lora, qlora or qat.")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", "--context", help="Tokens of a row.")]
MicroBatchSize = Annotated[
    int | None, typer.Option("--micro-batch-size", "--batch", help="Rows that go through the model at once.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, as precision.weights=fp32.")
]
Gpus = Annotated[int | None, typer.Option(min=1, help="Devices of a machine; on a CPU, processes.")]
Nodes = Annotated[int | None, typer.Option(min=1, help="Machines, each with as many devices.")]
Sharding = Annotated[
    str | None, typer.Option(help="ddp, zero1, zero2, zero3 or hsdp; of several devices zero3, unless the recipe says.")
]
Tensor = Annotated[int | None, typer.Option(min=1, help="Devices that share each matrix.")]
Tokens = Annotated[
    str | None, typer.Option(help="Hours, price and energy of a run over so many, as 1B.", show_default=False)
]
Anew = Annotated[bool, typer.Option("--no-cache", help="Rehearse anew what was answered before.")]
PackedFormat = Annotated[
    str | None, typer.Option("--format", help="Pack the weights as they are read: int8, w8a8, int4 or nf4.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def budget_of(device: Device, cap: int | None, recipe: Recipe | None = None) -> int:
    """Bytes that a run may use, each of its processes: what is free now, or what the user said. A CPU's are shared."""
    budget = device.memory_free_bytes if cap is None else device.memory_bytes
    return budget // recipe.parallel.devices_per_node if recipe is not None and device.kind == "cpu" else budget


def spread(*, gpus: int | None, nodes: int | None, sharding: str | None, tensor: int | None) -> list[str]:
    """Recipe settings for the options that say how many devices there are and what they share."""
    named = {"devices_per_node": gpus, "nodes": nodes, "sharding": sharding, "tensor": tensor}
    return [f"parallel.{key}={value}" for key, value in named.items() if value is not None]


def device_of(name: str, gpu: str | None, cap: int | None, *, quick: bool = False) -> Device:
    """The GPU of the catalogue that was named, else a device of this machine; `cap` limits its memory.

    `quick` looks at this machine without torch, as does anyone where the processor's rates were measured before.
    """
    if gpu is not None:
        if name != "cpu":
            raise UsageError(f"--gpu {gpu} and --device {name} both name a device; give one of them")
        return find(gpu).capped(cap)
    if quick or (name == "cpu" and kept_rates(cpu_identity(detect_host())) is not None):
        return quick_device(name, cap)
    from brim.hardware.measure import resolve_device

    return resolve_device(name, cap)


def recipe_of(
    source: str,
    *,
    method: str | None,
    seq_len: int | None,
    micro_batch_size: int | None,
    settings: list[str] | None,
    new_tokens: int = 0,
) -> tuple[Recipe, ModelSpec]:
    """The recipe that the options mean, and the description of its model.

    `new_tokens`: positions that the default length of a row leaves free.
    """
    named = {"method": method, "seq_len": seq_len, "micro_batch_size": micro_batch_size}
    asked = [*(f"{key}={value}" for key, value in named.items() if value is not None), *(settings or [])]
    if source.endswith(".toml"):
        recipe = Recipe.from_toml(Path(source))
        spec = describe(recipe.model)
    else:
        spec = describe(source)
        recipe = default_recipe(spec, source, new_tokens=new_tokens)
        asked = [*_loss(asked), *asked]
    if method == "qlora" and not recipe.precision.packed:
        asked.insert(0, "precision.weights=nf4")
    recipe = recipe.with_settings([*_sharding(recipe, asked), *asked])
    if not source.endswith(".toml") and not any(setting.startswith("optimizer.rounding=") for setting in asked):
        recipe = recipe.with_values({"optimizer.rounding": recipe.best_rounding})
    return recipe, spec


def default_recipe(spec: ModelSpec, source: str, *, new_tokens: int = 0) -> Recipe:
    """What a model is trained by where nobody says otherwise: the best kernels and loss that its family has."""
    positions = spec.num_positions or 1024
    own = [f"memory.attention={spec.attention}", f"memory.loss={spec.loss}", f"num_labels={spec.num_labels}"]
    try:
        recipe = Recipe(model=source, task=spec.task, seq_len=max(2, min(1024, positions - new_tokens)))
        return recipe.with_settings(own)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None


def _loss(asked: list[str]) -> list[str]:
    """A classifier has one row of logits, and another library's loss keeps them all: neither comes in chunks."""
    whole = any(setting.startswith(("library.loss=", "task=sequence-classification")) for setting in asked)
    return ["memory.loss=full"] if whole else []


def _sharding(recipe: Recipe, asked: list[str]) -> list[str]:
    """What several devices share where nobody has said it: everything, which is what takes the least memory."""
    many = any(setting.startswith(("parallel.devices_per_node=", "parallel.nodes=")) for setting in asked)
    return ["parallel.sharding=zero3"] if many and recipe.parallel.sharding == "none" else []
