"""A model with its adapters added in, written layer by layer: merged weights never exist all at once.

How this differs from PEFT's `merge_and_unload`: that rounds the whole merged model into memory (over a packed base: all
of it in 16 bits) before anything is written. Here one weight at a time is unpacked, added up in FP32, rounded once and
written to its place in the file. Over a packed base it is the unpacked weight that the adapter is added to: the one
that it was trained beside.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from brim.checkpoints.writer import OutputFile, bytes_of, create, index_of, plan_shards, write_at
from brim.layers.packed_experts import PackedExperts
from brim.layers.packed_linear import PackedLinear
from brim.models.directory import INDEX
from brim.models.spec import TensorSpec
from brim.numerics.encode import TORCH_DTYPES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A tensor of the merged model, made when it is asked for."""

    spec: TensorSpec
    make: Callable[[], Tensor]
    is_adapted: bool


def write_merged(model: PeftModel, directory: Path) -> None:
    """The merged model in Hugging Face form, into an existing directory; the model itself stays as it is."""
    base = model.get_base_model()
    tensors = {tensor.spec.name: tensor for tensor in merged_tensors(model)}
    files = plan_shards([tensor.spec] for tensor in tensors.values())
    for file in files:
        _write(directory / file.name, file, tensors)
    if (index := index_of(files)) is not None:
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _write_config(base, directory)


def merged_tensors(model: PeftModel) -> Iterator[Merged]:
    """Every tensor that the base's own `state_dict` would have had, by its name there; tied ones once."""
    base = model.get_base_model()
    adapters: dict[nn.Module, list[LoraLayer]] = {}
    for module in base.modules():
        if isinstance(module, LoraLayer):
            adapters.setdefault(module.get_base_layer(), []).append(module)
    seen: set[int] = set()
    for path, module in base.named_modules():
        owner = _own_name(base, path)
        if owner is None or isinstance(module, LoraLayer | ModulesToSaveWrapper):
            continue
        for name, shape, dtype, make in _tensors(module, adapters.get(module, []), seen):
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            full = f"{owner}.{name}" if owner else name
            spec = TensorSpec(name=full, shape=tuple(shape), dtype=_NAMES[dtype], nbytes=nbytes)
            yield Merged(spec=spec, make=make, is_adapted=module in adapters)


_Parts = Iterator[tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]]


def _tensors(module: nn.Module, adapters: list[LoraLayer], seen: set[int]) -> _Parts:
    """(name, shape, format, how to make it) of what the module itself holds."""
    if isinstance(module, PackedExperts):
        for name, (matrices, rows, inputs) in module.shapes.items():
            fused = (module.num_experts, matrices * rows, inputs)
            yield name, fused, module.compute, partial(_experts, module, name, fused)
        return
    if isinstance(module, PackedLinear):
        shape = (module.out_features, module.in_features)
        turned = shape[::-1] if module.transposed else shape
        yield "weight", turned, module.compute, partial(_unpacked, module, adapters)
    buffers = {} if isinstance(module, PackedLinear) else dict(module.named_buffers(recurse=False))
    lasting = {name: one for name, one in buffers.items() if name not in module._non_persistent_buffers_set}
    for name, tensor in [*module.named_parameters(recurse=False), *lasting.items()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            own = [layer for layer in adapters if getattr(layer, "parameter_name", "weight") == name]
            yield name, tuple(tensor.shape), tensor.dtype, partial(_added, tensor.detach(), own)


def _added(weight: Tensor, adapters: list[LoraLayer]) -> Tensor:
    """In the weight's own format, rounded once."""
    if not adapters:
        return weight
    with torch.no_grad():
        total = weight.float() if weight.dtype != torch.float32 else weight.clone()
        for layer in adapters:
            for adapter in layer.active_adapters:
                total += _delta(layer, adapter)
                if adapter in layer.lora_magnitude_vector:
                    _set_lengths(total, layer.lora_magnitude_vector[adapter].weight, turned=layer.fan_in_fan_out)
    return total.to(weight.dtype)


def _set_lengths(total: Tensor, lengths_R: Tensor, *, turned: bool) -> None:
    """DoRA: each output has the length that was learned, whatever the sum's is."""
    total_RK = total.T if turned else total
    total_RK *= (lengths_R.float() / torch.linalg.vector_norm(total_RK, dim=1)).unsqueeze(1)


def _delta(layer: LoraLayer, adapter: str) -> Tensor:
    """What the adapter adds, in FP32 and as its layer holds the weight."""
    if isinstance(layer, ParamWrapper):
        return layer.get_delta_weight(adapter).float()
    product = (layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()).mul_(layer.scaling[adapter])
    return product.T if layer.fan_in_fan_out else product


def _unpacked(layer: PackedLinear, adapters: list[LoraLayer]) -> Tensor:
    weight_RK = _added(layer.unpacked(), adapters)
    return weight_RK.T.contiguous() if layer.transposed else weight_RK


def _experts(experts: PackedExperts, name: str, shape: tuple[int, ...]) -> Tensor:
    """All experts of a layer, which transformers holds as one tensor."""
    matrices, rows, _ = experts.shapes[name]
    whole = experts._buffers[name].new_empty(shape, dtype=experts.compute)  # type: ignore[union-attr]
    for expert in range(experts.num_experts):
        for matrix in range(matrices):
            whole[expert, matrix * rows : (matrix + 1) * rows] = experts.matrix(name, expert, matrix).unpacked()
    return whole


def _own_name(base: PreTrainedModel, path: str) -> str | None:
    """A module's name without PEFT's wrappers; None for what is PEFT's own."""
    parts: list[str] = []
    module: nn.Module = base
    for part in path.split(".") if path else []:
        wrapper, module = module, module.get_submodule(part)
        if isinstance(wrapper, LoraLayer):
            if part != "base_layer":
                return None
        elif isinstance(wrapper, ModulesToSaveWrapper):
            # the copies that are trained are in a dictionary by adapter; the original has had its day
            if part != "modules_to_save":
                return None
        elif parts and isinstance(wrapper, nn.ModuleDict) and part == "default":
            continue
        else:
            parts.append(part)
    return ".".join(parts)


def _write(path: Path, file: OutputFile, tensors: dict[str, Merged]) -> None:
    create(path, file, {})
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for spec in file.tensors:
            write_at(descriptor, bytes_of(tensors[spec.name].make().cpu()), file.places[spec.name])
    finally:
        os.close(descriptor)


def _write_config(base: PreTrainedModel, directory: Path) -> None:
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(directory)
    if base.can_generate():
        base.generation_config.save_pretrained(directory)
