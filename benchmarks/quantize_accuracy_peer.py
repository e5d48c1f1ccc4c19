"""llm-compressor's GPTQ of a model: `SOURCE TOKENS OUTPUT BITS GROUP` (GROUP 0: a scale per channel).

Runs in an environment that has llm-compressor; so it imports nothing of Brim. TOKENS is a safetensors file with the
sequences to calibrate on; OUTPUT becomes a safetensors file with the linear weights as a reader would see them.
"""

import importlib
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(source: str, tokens: str, output: str, bits: int, group: int) -> None:
    datasets, llmcompressor = importlib.import_module("datasets"), importlib.import_module("llmcompressor")
    gptq = importlib.import_module("llmcompressor.modifiers.quantization")
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    rows = load_file(tokens)["tokens"].tolist()
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group" if group else "channel"}
    scheme = {"targets": ["Linear"], "weights": weights | ({"group_size": group} if group else {})}
    llmcompressor.oneshot(
        model=model,
        dataset=datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=gptq.GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme}),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
    )
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    state = model.state_dict()
    save_file({f"{name}.weight": state[f"{name}.weight"].contiguous() for name in names}, output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
