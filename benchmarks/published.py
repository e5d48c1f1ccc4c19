"""A published row -> the recipe that it ran and the device it ran on, or what is missing to say so.

Each column has one function. What the trainer cannot run yet raises `Missing`; when a lever lands, its function gives
settings instead.
"""

import csv
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from brim.errors import BrimError
from brim.hardware import Device, find
from brim.models import ModelSpec, catalogue, describe
from brim.recipe import Recipe, Writing

DATA = Path(__file__).parent / "data"
Row = Mapping[str, str]

_UNITS = {"bytes": 1, "MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}
_SAME_ARCHITECTURE = {
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "unsloth/Mistral-7B-v0.2": "mistralai/Mistral-7B-v0.1",
    "mistral-community/Mistral-7B-v0.2": "mistralai/Mistral-7B-v0.1",
    "meta-llama/Meta-Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.2-3B-Instruct": "meta-llama/Llama-3.2-3B",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mistralai/Mixtral-8x7B-v0.1",
    "TheBloke/Mistral-7B-v0.1-GPTQ": "mistralai/Mistral-7B-v0.1",
    "TheBloke/Mixtral-8x7B-Instruct-v0.1-GPTQ": "mistralai/Mixtral-8x7B-v0.1",
    "TheBloke/Llama-2-70B-GPTQ": "meta-llama/Llama-2-70b-hf",
    "01-ai/Yi-34B-Chat": "01-ai/Yi-34B",
    "Qwen/Qwen-1_8B-Chat-Int4": "Qwen/Qwen-1_8B-Chat",
    "Qwen/Qwen-7B-Chat-Int4": "Qwen/Qwen-7B-Chat",
}
_DEVICES = {"": "a100", "A100": "a100", "H100 96GB (HBM2e)": "h100", "V100-SXM2-16GB": "v100"}
_PROJECTIONS = {
    "llama": {"q": ["q_proj"], "k": ["k_proj"], "v": ["v_proj"], "o": ["o_proj"], "output_proj": ["o_proj"],
              "mlp": ["gate_proj", "up_proj", "down_proj"], "up": ["up_proj"], "down": ["down_proj"],
              "c": []},  # c_attn, which these have not: PEFT passes over it
    # litgpt adapts parts of a fused matrix; transformers' Falcon has one matrix for q, k and v
    "falcon": {"q": ["query_key_value"], "k": ["query_key_value"], "v": ["query_key_value"], "o": ["dense"]},
    "stablelm": {"q": ["query_key_value"], "k": ["query_key_value"], "v": ["query_key_value"], "o": ["dense"]},
    "gpt_bigcode": {"q": [], "k": [], "v": [], "o": [], "c": ["c_attn"]},
    "qwen": {"c_attn": ["q_proj", "k_proj", "v_proj"], "c_proj": ["o_proj", "down_proj"], "w1": ["up_proj"],
             "w2": ["gate_proj"]},
}  # fmt: skip
_LITGPT_TARGETS = {"q": "query", "k": "key", "v": "value", "o": "projection", "mlp": "mlp", "lm_head": "head"}

_WITHOUT_PADDING = ("llama", "mistral", "mixtral")
"""fms-hf-tuning gives their tokenizers a token for it, and the model a row (tokenizer_data_utils.py, multiple_of=1)."""

_DROPOUT = {"Lightning-AI/litgpt": 0.05, "foundation-model-stack/fms-acceleration": 0.1}
"""config_hub's and the script's own default (nothing is sampled, any rate takes as much); scenarios.yaml."""

_FSDP1 = ("foundation-model-stack/fms-acceleration", "AnswerDotAI/fsdp_qlora")
"""Through accelerate, and directly; both with reentrant checkpoints, which were the default."""

_REENTRANT = (*_FSDP1, "QwenLM/Qwen@", "modelscope/ms-swift")
"""transformers 4's default (modeling_utils.py, gradient_checkpointing_enable); fsdp_qlora's command asks for it."""

_BEFORE_PEFT_11 = ("AnswerDotAI/fsdp_qlora", "QwenLM/Qwen@", "modelscope/ms-swift")
_TORCHTUNE = ("pytorch/torchtune", "meta-pytorch/torchtune")

_CONTEXT_BYTES = 1343 * 2**20
"""model_memory_anatomy.md: occupied before there is a model, all kernels loaded (CUDA 11.2, lazy from 11.7 on)."""


class Missing(Exception):
    """The row cannot be expressed; the text says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a row ran."""

    spec: ModelSpec
    recipe: Recipe
    device: Device
    writing: Writing | None = None
    """Of inference: what was read and written."""


def read(path: Path) -> list[Row]:
    """Rows that say all that a rehearsal needs."""
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["well_specified"] == "yes"]


def measured_bytes(row: Row) -> int:
    # a few programs print GiB and call them GB; the row's notes say so. Qwen's script divides by 1024
    # (speed_benchmark_transformers.py), its document says MB
    unit = "GiB" if "GiB printed as GB" in row["notes"] else row["unit"]
    unit = "MiB" if "likely MiB" in row["notes"] else unit
    return round(float(row["peak_memory_value"]) * _UNITS[unit])


def case_of(row: Row) -> Case:
    """Raises Missing."""
    writing = _writing(row)
    columns: tuple[Callable[[Row], list[str]], ...] = (
        _task, _parallel, _quantization, _method, _precision, _trainer, _optimizer, _checkpointing, _attention, _loss,
        _compile, _batch,
    )  # fmt: skip
    if writing is not None:
        columns = (_parallel, _quantization, _precision, _attention, _compile)
    try:
        settings = [setting for column in columns for setting in column(row)]
    except ValueError as error:
        raise Missing(f"a value that cannot be read: {error}") from None
    spec = spec_of(row["model"])
    if row["attention"].startswith("flash"):
        # FlashAttention takes a window as a number; without this a mask is built for torch's own kernels
        spec = replace(spec, config={**spec.config, "sliding_window": None})
    if row["source_repo_or_paper"].startswith("foundation-model-stack") and spec.model_type in _WITHOUT_PADDING:
        spec = replace(spec, config={**spec.config, "vocab_size": int(spec.config["vocab_size"]) + 1})
    if row["source_repo_or_paper"].startswith("Lightning-AI/litgpt"):
        # its one model class (litgpt/model.py) gives every model a head of its own
        spec = replace(spec, config={**spec.config, "tie_word_embeddings": False}, tied_head=False)
    try:
        recipe = Recipe(model=row["model"]).with_settings(settings)
    except BrimError as error:
        raise Missing(str(error)) from None
    device = device_of(row["gpu"])
    if row["source_repo_or_paper"].startswith("huggingface/transformers docs"):
        device = replace(device, context_bytes=_CONTEXT_BYTES)
    return Case(spec=spec, recipe=recipe, device=device, writing=writing)


@cache
def spec_of(model: str) -> ModelSpec:
    name = _SAME_ARCHITECTURE.get(model, model)
    others = json.loads((DATA / "architectures.json").read_text(encoding="utf-8"))
    if name in others:
        facts = others[name]
        return ModelSpec(
            name=model,
            kind="directory",
            config=facts["config"],
            num_parameters=facts["num_parameters"],
            tied_head=facts["tied_head"],
        )
    if catalogue.find(name) is None:
        raise Missing(f"model {model} is not in the catalogue")
    return describe(name)


def device_of(gpu: str) -> Device:
    try:
        return find(_DEVICES.get(gpu, gpu))
    except BrimError as error:
        raise Missing(str(error)) from None


def _writing(row: Row) -> Writing | None:
    """`6144 in + 2048 out`; a plain forward makes the logits of all tokens and writes none."""
    if row["task"] != "inference":
        return None
    rows = int(row["micro_batch_size"])
    if row["method"].startswith("prefill forward"):
        return Writing(batch_size=rows, context=int(row["seq_len"]), new_tokens=1, logits="all")
    asked = re.fullmatch(r"(\d+) in \+ (\d+) out", row["seq_len"])
    if asked is None:
        raise Missing(f"inference: {row['method']}, {row['seq_len']}")
    return Writing(batch_size=rows, context=int(asked[1]), new_tokens=int(asked[2]))


def _task(row: Row) -> list[str]:
    if "sequence classification" in row["method"]:
        return ["task=sequence-classification"]
    return []


def _parallel(row: Row) -> list[str]:
    text = row["parallelism"]
    if text == "none" and row["n_gpus"] in ("1", ""):
        return []
    plain = re.fullmatch(r"fsdp(\d+)( FULL_SHARD \(BACKWARD_PRE\)| full_shard| \(FSDP2\))?(?: \+ (cpu offload))?", text)
    if plain is None:
        raise Missing(f"sharding: {re.sub('[0-9]+', 'N', text)}")
    settings = ["parallel.sharding=zero3", f"parallel.devices_per_node={plain[1]}"]
    # Lightning's checkpoints are not reentrant, torchtitan and torchtune have FSDP2
    if row["source_repo_or_paper"].startswith(_FSDP1):
        settings.append("library.sharding=fsdp1")
    if row["source_repo_or_paper"].startswith("Lightning-AI/litgpt"):
        settings.append("library.accumulation=whole")  # finetune/lora.py: no_backward_sync while it accumulates
    if plain[3]:
        settings.append("memory.offload=weights")
    return settings


_BASES = {
    "bnb-nf4": ["precision.weights=nf4"],
    "bnb-int4": ["precision.weights=nf4"],  # the library's default type of 4 bits takes as much
    "bnb.nf4": ["precision.weights=nf4", "precision.double_quant=false"],
    "bnb.nf4-dq": ["precision.weights=nf4"],
    "torchao-nf4": ["precision.weights=nf4"],
    "gptq-int4": ["precision.weights=int4"],
    "gptq-int8": ["precision.weights=int8"],
}


def _quantization(row: Row) -> list[str]:
    """What else a packed base's library does: casts, and whether the scales of blocks are packed, too."""
    if row["quant"] in ("none", ""):
        return []
    if row["quant"] not in _BASES:
        raise Missing(f"quantized base: {row['quant']}")
    settings = _BASES[row["quant"]]
    if row["source_repo_or_paper"].startswith("Lightning-AI/litgpt"):
        # litgpt asks for this version; double quantization is "bnb.nf4-dq" alone
        plain = _BASES["bnb.nf4"] if row["quant"] == "bnb-nf4" else settings
        settings = [*plain, "library.packed=bitsandbytes-0.42"]
    # TRL prepares the model, unless it is sharded; fms-acceleration's own plugins cast nothing.
    if "framework_config=baseline-peft-bnb" in row["notes"] and row["parallelism"] == "none":
        return [*settings, "library.frozen=fp32-norms"]
    return settings


def _method(row: Row) -> list[str]:
    method = row["method"].split(" (")[0]
    if method not in ("full", "lora", "qlora"):
        raise Missing(f"method: {row['method']}")
    if method == "full":
        return ["method=full"]
    if row["source_repo_or_paper"].startswith("Lightning-AI/litgpt"):
        names = json.dumps([_LITGPT_TARGETS[part] for part in row["lora_targets"].split("+")])
    else:
        names = json.dumps(_targets(row))
    # torchtune makes the whole model in one format (recipes/lora_finetune_single_device.py, set_default_dtype);
    # PEFT gave adapters their layer's until 0.11 (peft#1706, autocast_adapter_dtype, May 2024): beside codes FP32
    plain = ("Lightning-AI/litgpt", *_TORCHTUNE, *(_BEFORE_PEFT_11 if method == "lora" else ()))
    adapters = "weights" if row["source_repo_or_paper"].startswith(plain) else "fp32"
    if method == "qlora" and row["parallelism"] != "none":
        adapters = "weights"  # trl/trainer/sft_trainer.py: autocast_adapter_dtype=False for a sharded, packed base
    dropout = _DROPOUT.get(row["source_repo_or_paper"].split("@")[0], 0.0)
    return [
        f"method={method}",
        f"lora.rank={row['lora_rank']}",
        f"lora.dropout={dropout}",
        f"lora.targets={names}",
        f"library.adapters={adapters}",
    ]


def _targets(row: Row) -> list[str]:
    text, family = row["lora_targets"], "llama"
    if "falcon" in row["model"].casefold():
        family = "falcon"
    if "stablelm-base-alpha" in row["model"]:
        family = "stablelm"
    if row["model"].startswith("Qwen/Qwen-"):
        family = "qwen"
    if "bigcode" in row["model"]:
        family = "gpt_bigcode"
    if text.startswith("DEFAULT (qkv"):
        text = {"qwen": "c_attn"}.get(family, "q+k+v")
    if text.startswith(("all linear", "ALL")):
        return ["all-linear"]
    if "lm_head" in text:
        raise Missing("adapter on the output head")
    known = _PROJECTIONS[family]
    parts = text.split("+")
    if unknown := [part for part in parts if part not in known]:
        raise Missing(f"lora targets: {', '.join(unknown)}")
    return list(dict.fromkeys(name for part in parts for name in known[part]))


def _precision(row: Row) -> list[str]:
    """FP16 takes BF16's bytes; loss scaling adds a scalar."""
    half = re.match(r"(bf16|fp16)", row["compute_dtype"].casefold()) is not None
    if row["quant"] not in ("none", "") and half:
        return ["precision.compute=bf16"]
    weights = {"bf16": "bf16", "fp16": "bf16", "fp32": "fp32"}.get(row["weight_dtype"].casefold())
    # accelerate upcasts what a sharded run trains, and gathers it in 16 bits
    if row["parallelism"] != "none" and row["method"] == "full" and "autocast" in row["compute_dtype"]:
        weights = "fp32"
    if row["weight_dtype"] == "fp32 (FSDP sharded)":
        weights, half = "fp32", "bf" in row["compute_dtype"]
    if weights is None or not (half or row["compute_dtype"].casefold() == "fp32"):
        raise Missing(f"precision: {row['weight_dtype']} weights, {row['compute_dtype']} compute")
    return [f"precision.weights={weights}", f"precision.compute={'bf16' if half else 'fp32'}"]


def _trainer(row: Row) -> list[str]:
    """fms-acceleration's refs say `fp16` or `bf16` of every run on a packed base, and of all in the file with Liger."""
    if not row["source_repo_or_paper"].startswith("foundation-model-stack"):
        return []
    asked = "autocast" in row["compute_dtype"] or row["quant"] not in ("none", "")
    found = ["library.autocast=true"] if asked else []
    return [*found, "library.cache=kept"] if "bigcode" in row["model"] else [*found, "library.angles=product"]


def _optimizer(row: Row) -> list[str]:
    if row["parallelism"].endswith("cpu offload"):
        return []  # it steps on the host, one by one
    if row["optimizer"] == "Adafactor":
        return ["optimizer.name=adafactor"]
    if row["optimizer"] == "AdamW (fused)":
        return []
    if row["source_repo_or_paper"].startswith(_TORCHTUNE):
        # no clipping is asked for; fused: foreach's temporaries (6 GiB of a 3B model) would not fit in its baseline
        found = ["optimizer.max_grad_norm=0"]
        if "optimizer_in_bwd" in row["optimizer"]:
            found.append("optimizer.in_backward=true")
        if row["optimizer"].startswith("AdamW8bit"):
            found.append("optimizer.name=adamw8bit")
        return found
    if row["optimizer"] in ("adamw_bnb_8bit", "adamw_8bit", "Adam8bit (bnb)"):
        return ["optimizer.name=adamw8bit"]
    if row["optimizer"].startswith("PagedAdamW"):
        # FP32 states in managed memory, which is not PyTorch's allocator's (of matrices below 1e5 elements in its)
        return ["memory.offload=optimizer"]
    # bitsandbytes' paged AdamW keeps states of 32 bits, outside PyTorch's allocator where a matrix is large
    if not re.match(r"(paged)?adamw($| \((torch|adamw_torch|HF Trainer|swift|bnb))", row["optimizer"], re.IGNORECASE):
        raise Missing(f"optimizer: {row['optimizer']}")
    return ["library.adamw=foreach"]


def _checkpointing(row: Row) -> list[str]:
    text = row["activation_checkpointing"]
    if text == "full + activation offload":
        return ["memory.activation_checkpointing=full", "memory.offload=activations"]
    if text not in ("none", "full", "full (use_reentrant=False)"):
        raise Missing(f"activation checkpointing: {text or 'not said'}")
    reentrant = row["source_repo_or_paper"].startswith(_REENTRANT) and text == "full"
    found = ["library.checkpoints=reentrant"] if reentrant else []
    return [f"memory.activation_checkpointing={text.split()[0]}", *found]


def _attention(row: Row) -> list[str]:
    """`flash` is rehearsed as torch's own kernel of the same algorithm."""
    if row["source_path_or_url"].endswith("_liger.csv"):
        return ["library.heads=repeated"]  # 4.45.2 (`_transformers_of`); 4.48.1 of the others reads grouped heads
    if row["attention"] == "eager":
        return ["memory.attention=eager"]
    if not row["attention"].startswith(("sdpa", "flash")):
        raise Missing(f"attention: {row['attention'] or 'not said'}")
    return []


def _loss(row: Row) -> list[str]:
    text, source = row["fused_or_chunked_loss"], row["source_repo_or_paper"]
    if source.startswith("Lightning-AI/litgpt"):
        loss = "litgpt-full" if row["method"] == "full" else "litgpt"
        # resource-tables.md, of 2023: the longest row came first and alone, those after it were shorter
        if row["id"].startswith("litgpt-res"):
            loss = "litgpt-first"
        return ["library.model=litgpt", f"library.loss={loss}"]
    if source.startswith("PyPI vramcalc"):
        return ["library.loss=held"]
    if source.startswith(_TORCHTUNE):
        whole = "brim" if row["compile"] == "no" else "transformers-4.50"
        return [f"library.loss={'torchtune' if text == 'CEWithChunkedOutputLoss' else whole}"]
    if text.startswith("fused linear CE"):
        return ["memory.loss=chunked", "library.norm=fused", "library.rotary=in-place"]
    if "sequence classification" in row["method"]:
        return []
    loss = f"library.loss={_transformers_of(row)}"
    if text.startswith("fast CE"):
        return [loss, "library.cross_entropy=in-place", "library.norm=fused", "library.rotary=in-place"]
    if text in ("no", ""):
        return [loss]
    raise Missing(f"loss: {text}")


def _transformers_of(row: Row) -> str:
    """Whose loss ran. fms-acceleration: 4.46, where Granite and GPT-BigCode still had their own; the file with Liger is
    older (4.45.2 and PyTorch 2.4.1: refs/requirements.txt at 0aab2c6, the commit that brought Liger's kernels)."""
    if not row["source_repo_or_paper"].startswith("foundation-model-stack"):
        return "transformers-4.40"
    if row["source_path_or_url"].endswith("_liger.csv"):
        return "transformers-4.40"
    own = {"ibm/PowerLM-3b": "transformers-4.40", "bigcode/gpt_bigcode-santacoder": "transformers-16bit"}
    return own.get(row["model"], "transformers-4.46")


def _compile(row: Row) -> list[str]:
    """torchtune compiles each block and the loss: what is elementwise runs in one kernel, and between its ends nothing
    is kept."""
    if row["compile"] != "yes":
        return []
    if not row["source_repo_or_paper"].startswith(_TORCHTUNE):
        raise Missing("torch.compile")
    return ["library.norm=fused", "library.activation=fused", "library.cross_entropy=fused"]


def _batch(row: Row) -> list[str]:
    """Two micro-batches take as much as any more. vramcalc keeps zeroed gradients, as accumulation does."""
    accumulation = min(2, int(row["grad_accum"] or 1))
    if "set_to_none=False" in row["notes"]:
        accumulation = 2
    return [
        f"micro_batch_size={row['micro_batch_size']}",
        f"grad_accumulation={accumulation}",
        f"seq_len={row['seq_len']}",
    ]
