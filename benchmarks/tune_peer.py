"""Another trainer's fine-tuning run: `NAME JOB.json` prints its peak, speed and losses as one JSON object.

`trainer`: transformers' Trainer, bf16=True and its defaults. `sft`: TRL's SFTTrainer with a LoraConfig, the same. Runs
in an environment that has that tool; of Brim it imports only the meter, so that both peaks are told alike.
"""

import importlib
import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from brim.memory.measured import CpuMeter


class Watch(TrainerCallback):  # type: ignore[misc]
    """Times each step, and samples the meter after it."""

    def __init__(self, meter: CpuMeter) -> None:
        self.meter, self.seconds, self._started = meter, [], 0.0  # type: tuple[CpuMeter, list[float], float]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        self.meter.sample()


class InOrder:
    """Neither trainer shuffles: the rows of a step are those that Brim's step has."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


def arguments(job: dict[str, Any], kind: Any, **more: Any) -> Any:
    return kind(
        output_dir=job["place"],
        max_steps=job["steps"],
        per_device_train_batch_size=job["rows"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=True,
        seed=job["seed"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **more,
    )


def trainer(job: dict[str, Any], model: Any, rows: list[dict[str, list[int]]], watch: Watch) -> Any:
    class Ordered(InOrder, Trainer):  # type: ignore[misc]
        pass

    return Ordered(model=model, args=arguments(job, TrainingArguments), train_dataset=rows, callbacks=[watch])


def sft(job: dict[str, Any], model: Any, rows: list[dict[str, list[int]]], watch: Watch) -> Any:
    trl, peft, datasets = (importlib.import_module(name) for name in ("trl", "peft", "datasets"))

    class Ordered(InOrder, trl.SFTTrainer):  # type: ignore[misc, name-defined]
        pass

    settings = {"r": job["rank"], "lora_alpha": job["alpha"], "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return Ordered(
        model=model,
        args=arguments(job, trl.SFTConfig, max_length=None, packing=False),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=peft.LoraConfig(**settings),
        callbacks=[watch],
    )


TOOLS = {"trainer": trainer, "sft": sft}


def main(name: str, path: str) -> None:
    with open(path, encoding="utf-8") as file:  # noqa: PTH123 - as its users do
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    rows = [{"input_ids": ids, "labels": own} for ids, own in zip(job["input_ids"], job["labels"], strict=True)]
    with CpuMeter() as meter:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        model.config.use_cache = False
        watch = Watch(meter)
        made = TOOLS[name](job, model, rows, watch)
        meter.start_over()
        made.train()
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    print(
        json.dumps({"peak_bytes": meter.peak.allocated_bytes, "seconds": watch.seconds, "losses": losses}), flush=True
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
