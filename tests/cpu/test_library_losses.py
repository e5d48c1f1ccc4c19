"""Losses of other libraries compute what Brim's own computes."""

import pytest
import torch
from torch import Tensor

from brim.memory.lifetimes import LifetimeMeter
from brim.models import ModelSpec
from brim.recipe import Recipe
from brim.training import generations
from brim.training.batches import synthetic_batch
from brim.training.build import build

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip
SPEC = ModelSpec(name="llama", kind="directory", config=CONFIG, num_parameters=1, tied_head=False)


def loss_and_gradients(library: str) -> tuple[Tensor, list[Tensor]]:
    """Of one batch whose last positions have no label (theirs never score them), FP32, the same weights each time."""
    torch.manual_seed(0)
    recipe = Recipe(model="llama", seq_len=16, micro_batch_size=3).with_settings(
        ["precision.weights=fp32", "precision.compute=fp32", *(f"library.{setting}" for setting in library.split())]
    )
    workload = build(recipe, SPEC)
    batch = synthetic_batch(recipe, SPEC)
    batch.labels[:, -1] = -100
    batch.labels[0, 3] = -100
    loss = workload.head.loss(workload.model, {"input_ids": batch.input_ids}, batch.labels, scale=0.1)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in workload.model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    "library",
    [
        "loss=transformers-4.40",
        "loss=transformers-4.46",
        "loss=transformers-4.46 cross_entropy=in-place",
        "loss=transformers-4.50",
        "loss=held",
        "loss=litgpt",
        "loss=transformers-16bit",
        "loss=transformers-4.50 cross_entropy=fused",
        "loss=torchtune",
        "loss=torchtune cross_entropy=fused",
        "loss=brim norm=fused",
        "loss=brim activation=fused",
    ],
)
def test_a_library_loss_is_the_loss(library: str) -> None:
    """Value and every gradient equal those of Brim's own loss: only memory differs."""
    ours, our_gradients = loss_and_gradients("loss=brim")
    theirs, their_gradients = loss_and_gradients(library)
    torch.testing.assert_close(theirs, ours)
    assert len(their_gradients) == len(our_gradients)
    for theirs_, ours_ in zip(their_gradients, our_gradients, strict=True):
        torch.testing.assert_close(theirs_, ours_, rtol=1e-4, atol=1e-6)


def test_a_shift_is_copied_twice_on_its_way_back() -> None:
    """In backward two tensors of the logits' length in FP32 are new, one without the last position and one with it, as
    PyTorch 2.4 makes them of `logits[..., :-1, :]`; the kernel itself writes over what it was given."""
    rows, tokens, words = 3, 16, 300
    logits_BTV = torch.zeros(rows, tokens, words, requires_grad=True)
    labels_BT = torch.zeros(rows, tokens, dtype=torch.long)
    with LifetimeMeter() as meter:
        total = generations._shifted_logits(logits_BTV * 1, labels_BT, generations._in_place)
        done = len(meter.trace.events)
        total.backward()
    events = meter.trace.events[done:]
    large = [block.nbytes for allocated, block in events if allocated and block.nbytes > 2 * rows * tokens * words]
    shifted, whole = 4 * rows * (tokens - 1) * words, 4 * rows * tokens * words
    assert large == [shifted, whole, whole]  # the last is the gradient of the product by 1
