"""What families do to logits after the head, which the chunked loss has to do too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from brim.errors import RecipeError
from brim.models import ModelSpec
from brim.models.families import FULL_LOSS_ONLY
from brim.models.skeleton import skeleton
from brim.training.head import OutputHead

_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_FACTORS: dict[str, dict[str, Any]] = {
    "cohere": {"model_type": "cohere", **_TINY, "num_key_value_heads": 4, "vocab_size": 500, "logit_scale": 0.3},
    "hyperclovax": {"model_type": "hyperclovax", **_TINY, "num_key_value_heads": 4, "vocab_size": 500, "head_dim": 16},
    "recurrent-gemma": {
        "model_type": "recurrent_gemma", **_TINY, "num_key_value_heads": 4, "lru_width": 64, "vocab_size": 500,
        "attention_window_size": 32, "head_dim": 16, "num_hidden_layers": 3,
    },
}  # fmt: skip
_CONFIGS: dict[str, dict[str, Any]] = _FACTORS | json.loads(
    (Path(__file__).parents[3] / "benchmarks" / "families.json").read_text(encoding="utf-8")
)
_REFUSED: dict[str, dict[str, Any]] = {
    "mobilebert": {"model_type": "mobilebert", **_TINY, "vocab_size": 500, "embedding_size": 32},
    "prophetnet": {
        "model_type": "prophetnet", "hidden_size": 64, "vocab_size": 500, "is_encoder_decoder": True,
        "num_encoder_layers": 1, "num_encoder_attention_heads": 4, "encoder_ffn_dim": 96,
        "num_decoder_layers": 1, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 96,
    },
}  # fmt: skip


def made(config: dict[str, Any]) -> tuple[ModelSpec, PreTrainedModel, dict[str, Tensor]]:
    """The family's description, a tiny model whose logits are as large as trained ones, and its inputs."""
    tied = bool(config.get("tie_word_embeddings", True))
    spec = ModelSpec(name="tiny", kind="directory", config=config, num_parameters=1, tied_head=tied)
    torch.manual_seed(0)
    model = skeleton(spec, dtype="fp32", attention=spec.attention)
    model.config.use_cache = False
    ids = torch.randint(3, 400, (2, 12))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if spec.is_encoder_decoder else {})
    bias = getattr(model, "final_logits_bias", None)
    if bias is not None:
        bias.normal_()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(3 / model.eval()(**inputs).logits.std())
    return spec, model, inputs


@pytest.mark.parametrize("family", _CONFIGS)
def test_a_family_whose_default_is_chunked_has_a_known_finish(family: str) -> None:
    """Where `ModelSpec.loss` says chunked, the loss's logits are the model's, of the size that trained ones have."""
    spec, model, inputs = made(_CONFIGS[family])
    assert spec.loss == "chunked"
    with torch.no_grad():
        assert model(**inputs).logits.abs().mean() > 0.2
    OutputHead(model, task=spec.task, chunked=True).check_finish(model, inputs)


@pytest.mark.parametrize("family", _REFUSED)
def test_a_family_that_does_more_keeps_all_logits(family: str) -> None:
    """Where more happens to logits than the chunked loss knows, the default is full, and chunked is refused."""
    spec, model, inputs = made(_REFUSED[family])
    assert spec.loss == "full" and spec.model_type in FULL_LOSS_ONLY
    with pytest.raises(RecipeError, match=r'nearest: memory\.loss = "full"'):
        OutputHead(model, task=spec.task, chunked=True).check_finish(model, inputs)
