"""One other tool's FP32 -> INT8 of the linear weights of a safetensors file: `NAME SOURCE OUTPUT` prints its seconds.

Runs in an environment that has that tool; so it imports nothing of Brim. Each tool is called tensor by tensor, as its
own converters do, and the result is saved with the library that its users save with.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Encode = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def torchao() -> Encode:
    quantization = importlib.import_module("torchao.quantization")
    int8 = importlib.import_module("torchao.quantization.quantize_.workflows.int8.int8_tensor").Int8Tensor

    def encode(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        made = int8.from_hp(weight, granularity=quantization.PerRow())
        return {"qdata": made.qdata, "scale": made.scale}

    return encode


def compressed_tensors() -> Encode:
    quantization = importlib.import_module("compressed_tensors.quantization")
    forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    helpers = importlib.import_module("compressed_tensors.quantization.utils.helpers")
    arguments = quantization.QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")

    def encode(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
        scale, zero_point = helpers.calculate_qparams(low, high, arguments)
        codes = forward.quantize(weight, scale, zero_point, arguments, dtype=torch.int8)
        return {"weight": codes, "scale": scale}

    return encode


def bitsandbytes() -> Encode:
    functional = importlib.import_module("bitsandbytes.functional")

    def encode(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scale, _ = functional.int8_vectorwise_quant(weight.half())  # it takes FP16 alone
        return {"weight": codes, "SCB": scale}

    return encode


def gguf() -> Encode:
    library = importlib.import_module("gguf")
    quants = importlib.import_module("gguf.quants")

    def encode(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": torch.from_numpy(quants.quantize(weight.numpy(), library.GGMLQuantizationType.Q8_0))}

    return encode


TOOLS: dict[str, Callable[[], Encode]] = {
    "torchao": torchao, "compressed-tensors": compressed_tensors, "bitsandbytes": bitsandbytes, "gguf": gguf,
}  # fmt: skip


def main(name: str, source: str, output: str) -> None:
    encode = TOOLS[name]()
    encode(torch.randn(64, 64))
    started = time.perf_counter()
    results: dict[str, Any] = {}
    with safe_open(source, framework="pt") as file:
        for tensor in file.keys():  # noqa: SIM118 - not a dictionary
            weight = file.get_tensor(tensor)
            if weight.dim() == 2 and "proj" in tensor:
                results |= {f"{tensor}.{part}": value for part, value in encode(weight).items()}
            else:
                results[tensor] = weight
    save_file(results, output)
    descriptor = os.open(output, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main(*sys.argv[1:])
