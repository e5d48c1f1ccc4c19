"""Greedy decoding of SmolLM2-135M, packed as it is read, against FP32 and BF16 in transformers, in one run.

Interleaved, best of several; processor time stands beside the clock's, for a machine that does other work (it then
tells more). All decode by transformers' own loop, so what differs is the weights' format and its kernel.
`BRIM_BENCH_THREADS` (all cores) sets torch's threads.
"""

import os
import time
from pathlib import Path

import torch

from brim.inference import Loaded, generate, load, locate, resident_bytes

ROUNDS = 5
TOKENS = 48
PROMPT = "The capital of France is"
PACKED = ("int8", "int4")


def models(directory: Path) -> dict[str, Loaded]:
    """By name; the baselines are plain."""
    plain = load(directory)
    half = load(directory)
    packed = {format: load(directory, pack=format, compute=torch.bfloat16) for format in PACKED}
    return {"FP32": plain, "BF16": Loaded(half.model.to(torch.bfloat16), half.tokenizer), **packed}


def seconds_per_token(loaded: Loaded) -> tuple[float, float]:
    """By the clock after the first token, and of the processor over all."""
    started = time.process_time()
    made = generate(loaded, PROMPT, max_tokens=TOKENS, chat=False)
    taken = time.process_time() - started
    return made.decode_s / (made.new_tokens - 1), taken / made.new_tokens


def main() -> None:
    if threads := os.environ.get("BRIM_BENCH_THREADS"):
        torch.set_num_threads(int(threads))
    found = models(locate("smollm2-135m"))
    best = {name: (float("inf"), float("inf")) for name in found}
    for _ in range(ROUNDS):
        for name, loaded in found.items():
            clock_s, processor_s = seconds_per_token(loaded)
            best[name] = min(best[name][0], clock_s), min(best[name][1], processor_s)
    fp32_bytes = resident_bytes(found["FP32"].model)
    for name, (clock_s, processor_s) in best.items():
        ratios = " and ".join(f"{best[base][0] / clock_s:.2f} x {base}'s" for base in ("FP32", "BF16") if base != name)
        by_processor = ", ".join(f"{best[base][1] / processor_s:.2f}" for base in ("FP32", "BF16") if base != name)
        print(
            f"decode: {name} {1 / clock_s:.1f} tokens/s, {ratios} (processor time: {by_processor}); "
            f"{resident_bytes(found[name].model) / fp32_bytes:.1%} of FP32's bytes resident"
        )


if __name__ == "__main__":
    main()
