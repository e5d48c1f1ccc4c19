"""Write tests/cpu/checkpoints/data/keras: tiny random models as transformers 4 saved them from TensorFlow.

Run in an environment of its own, since transformers 5 has no TensorFlow (Python 3.11):
    pip install tensorflow-cpu==2.18.1 tf-keras==2.18.0 transformers==4.57.6 torch==2.8.0
    python tools/keras_fixtures.py tests/cpu/checkpoints/data/keras
"""

import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

_SIZES = {"vocab_size": 37, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {**_SIZES, "intermediate_size": 24, "max_position_embeddings": 16}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 37, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0,
         "eos_token_id": 0},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 37, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
         "decoder_start_token_id": 0},
    ),
    "bart": (
        "BartForConditionalGeneration",
        {"vocab_size": 37, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24,
         "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "max_position_embeddings": 16},
    ),
}  # fmt: skip
IN_SHARDS = ("bart",)
NEWER = {"bert": "model.weights.h5", "t5": "model.weights.h5", "gpt2": "model.keras"}
"""Keras's own files, of two layers."""


def main(place: Path) -> None:
    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # the Keras that transformers 4 is written for
    transformers: Any = importlib.import_module("transformers")
    for family, (kind, sizes) in MODELS.items():
        limit = "8KB" if family in IN_SHARDS else "5GB"
        with _converted(transformers, kind, sizes, place / family) as model:
            model.save_pretrained(place / family, safe_serialization=False, max_shard_size=limit)
            (place / family / "generation_config.json").unlink(missing_ok=True)
    for family, name in NEWER.items():
        kind, sizes = MODELS[family]
        output = place / f"{family}-newer"
        layers = {key: 2 for key in ("num_hidden_layers", "num_layers", "n_layer") if key in sizes}
        with _converted(transformers, kind, sizes | layers, output) as model:
            save = model.save if name.endswith(".keras") else model.save_weights
            save(output / name)


@contextmanager
def _converted(transformers: Any, kind: str, sizes: dict[str, Any], output: Path) -> Iterator[Any]:
    """TensorFlow's model of random PyTorch weights, which go to the output beside their config."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as there:
        model.save_pretrained(there)
        yield getattr(transformers, f"TF{kind}").from_pretrained(there, from_pt=True)
        shutil.copyfile(Path(there) / "model.safetensors", output / "pytorch.safetensors")
        shutil.copyfile(Path(there) / "config.json", output / "config.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
