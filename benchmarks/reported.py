"""Rows of data/throughput.csv -> what ran: throughput that was published without a peak of memory.

Tokens of training alone, per GPU, as the sources count them. A row without its micro-batch or its checkpointing is not
well specified, and one that gives a share of the peak alone says how fast only by a formula.
"""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from benchmarks.published import DATA, Case, Missing, device_of, spec_of

from brim.errors import BrimError
from brim.hardware import Device
from brim.recipe import Recipe

_MODELS = {"Llama-3.1-8B": "meta-llama/Llama-3.1-8B", "MPT 7B": "mosaicml/mpt-7b", "MPT 13B": "mosaicml/mpt-13b"}
_DEVICES = {"H100-80GB-SXM": "h100", "A100-80GB-SXM": "a100", "H100 96GB 500W": "h100", "RTX 4090": "rtx-4090"}
_GRAND_TETON = ("H100 96GB 500W", 2.4e12, (835 + 989) / 2 / 989)
"""torchtitan's H100s: HBM2e of 2.4 TB/s, and at 500 W a peak between an NVL's and an SXM's (its footnote 2)."""
_PER_NODE = 8
_SHARDINGS = {"FULL_SHARD": ["library.sharding=fsdp1"], "FSDP2": []}
"""llm-foundry's Composer wraps with FSDP1."""


def reported(missing: Counter[str]) -> Iterator[tuple[str, Case, float, str]]:
    """(name, case, tokens a second and GPU, source) of each row that a recipe expresses; adds what others lack."""
    with (DATA / "throughput.csv").open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            try:
                yield f"throughput-{number:02}", _case(row), float(row["tokens_per_s_per_gpu"]), row["source"]
            except Missing as lack:
                missing[str(lack)] += 1


def _case(row: Mapping[str, str]) -> Case:
    """Raises Missing."""
    for name in ("tokens_per_s_per_gpu", "micro_batch_size", "activation_checkpointing"):
        if not row[name]:
            raise Missing(f"{name} is not said")
    if row["precision"] != "bf16 mixed" or row["sharding"] not in _SHARDINGS or row["method"] != "full":
        raise Missing(f"{row['method']}, {row['precision']}, {row['sharding']}")
    num_gpus = int(row["n_gpus"])
    settings = [
        f"seq_len={row['seq_len']}",
        f"micro_batch_size={row['micro_batch_size']}",
        f"memory.activation_checkpointing={row['activation_checkpointing']}",
        "precision.weights=fp32",
        "precision.compute=bf16",
        "parallel.sharding=zero3",
        f"parallel.devices_per_node={min(num_gpus, _PER_NODE)}",
        f"parallel.nodes={max(1, num_gpus // _PER_NODE)}",
        *_SHARDINGS[row["sharding"]],
    ]
    if row["compile"] == "yes":
        settings += ["library.norm=fused", "library.activation=fused", "library.cross_entropy=fused"]
    spec = spec_of(_MODELS[row["model"]])
    try:
        recipe = Recipe(model=spec.name).with_settings(settings)
    except BrimError as error:
        raise Missing(str(error)) from None
    return Case(spec=spec, recipe=recipe, device=_device(row["gpu"]))


def _device(gpu: str) -> Device:
    device = device_of(_DEVICES[gpu])
    name, bytes_per_s, share = _GRAND_TETON
    if gpu != name:
        return device
    flops = {number_format: share * rate for number_format, rate in device.flops.items()}
    return replace(device, flops=flops, bandwidth_bytes_per_s=bytes_per_s)
