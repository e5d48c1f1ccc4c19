"""The chunked loss against PyTorch's cross_entropy on all logits at once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brim.layers import chunked_loss
from brim.layers.chunked_loss import IGNORED, chunked_cross_entropy
from brim.memory.measured import CpuMeter

TOKENS, HIDDEN, VOCAB, SCALE = 50, 24, 101, 0.37
FINISHES: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda logits: logits,
    "softcap": lambda logits: torch.tanh(logits / 2) * 2,
    "division": lambda logits: logits / 4,
}
TIGHT = {"rtol": 1e-5, "atol": 1e-6}
LOOSE = {"rtol": 3e-2, "atol": 3e-2}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four chunks of the least size, the last one smaller; several parts of a low-precision product."""
    monkeypatch.setattr(chunked_loss, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(chunked_loss, "_ROWS_AT_ONCE", 17)


class Problem:
    """Hidden states, a head and labels; twice the same, so that one can go each way."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, bias: bool = False) -> None:
        torch.manual_seed(1)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=bias).to(dtype)
        self.hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
        self.labels = torch.randint(0, VOCAB, (TOKENS,))
        self.labels[::7] = IGNORED

    def full(self, finish: Callable[[Tensor], Tensor]) -> Tensor:
        logits = finish(self.head(self.hidden)).float()
        return SCALE * F.cross_entropy(logits, self.labels, ignore_index=IGNORED, reduction="sum")

    def chunked(self, finish: Callable[[Tensor], Tensor]) -> Tensor:
        return chunked_cross_entropy(self.hidden, self.head, self.labels, scale=SCALE, finish=finish)

    def gradients(self) -> list[Tensor]:
        found = [self.hidden.grad, *(parameter.grad for parameter in self.head.parameters())]
        return [gradient for gradient in found if gradient is not None]


def compare(ours: Problem, theirs: Problem, tolerance: dict[str, float], count: int) -> None:
    assert len(ours.gradients()) == len(theirs.gradients()) == count
    for our, their in zip(ours.gradients(), theirs.gradients(), strict=True):
        assert our.dtype == their.dtype
        torch.testing.assert_close(our, their, rtol=tolerance["rtol"], atol=tolerance["atol"])


@pytest.mark.parametrize("finish", FINISHES.values(), ids=FINISHES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_cross_entropy(finish: Callable[[Tensor], Tensor], bias: bool, dtype: torch.dtype) -> None:
    """Loss and gradients (hidden states, head, bias) are those of cross_entropy on all logits."""
    ours, theirs = Problem(dtype=dtype, bias=bias), Problem(dtype=dtype, bias=bias)
    tolerance = TIGHT if dtype == torch.float32 else LOOSE
    our_loss, their_loss = ours.chunked(finish), theirs.full(finish)
    assert our_loss.dtype == torch.float32
    torch.testing.assert_close(our_loss, their_loss, rtol=tolerance["rtol"], atol=0)
    our_loss.backward()
    their_loss.backward()
    compare(ours, theirs, tolerance, 3 if bias else 2)


@pytest.mark.parametrize("bias", [False, True])
def test_under_autocast(bias: bool) -> None:
    """FP32 weights under BF16 autocast: BF16 matmuls, FP32 gradients, as autocast's own."""
    ours, theirs = Problem(bias=bias), Problem(bias=bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        our_loss, their_loss = ours.chunked(FINISHES["softcap"]), theirs.full(FINISHES["softcap"])
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-3, atol=0)
    our_loss.backward()
    their_loss.backward()
    compare(ours, theirs, LOOSE, 3 if bias else 2)


def test_gradients_are_added() -> None:
    """A second micro-batch adds to the gradients of the first."""
    once, twice = Problem(bias=True), Problem(bias=True)
    once.chunked(FINISHES["nothing"]).backward()
    for _ in range(2):
        twice.chunked(FINISHES["nothing"]).backward()
    for one, two in zip(once.gradients(), twice.gradients(), strict=True):
        torch.testing.assert_close(two, 2 * one)


def test_a_frozen_head_gets_no_gradient() -> None:
    """With a frozen head (LoRA) only the hidden states have a gradient, the same as ever."""
    ours, theirs = Problem(bias=True), Problem(bias=True)
    for problem in (ours, theirs):
        problem.head.requires_grad_(False)
    ours.chunked(FINISHES["division"]).backward()
    theirs.full(FINISHES["division"]).backward()
    compare(ours, theirs, TIGHT, 1)


def test_without_gradients() -> None:
    """Under no_grad the loss is the same and nothing has a gradient."""
    problem = Problem(bias=True)
    with torch.no_grad():
        loss = problem.chunked(FINISHES["softcap"])
    assert not loss.requires_grad
    assert problem.gradients() == []
    torch.testing.assert_close(loss, problem.full(FINISHES["softcap"]).detach(), rtol=1e-6, atol=0)


def test_no_label_at_all() -> None:
    """Without a label the loss is zero and so are the gradients."""
    problem = Problem()
    problem.labels[:] = IGNORED
    loss = problem.chunked(FINISHES["nothing"])
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in problem.gradients())


def test_all_logits_never_exist() -> None:
    """The peak of forward and backward stays below the logits alone."""
    tokens, vocab = 512, 4096
    head, labels = nn.Linear(8, vocab, bias=False), torch.randint(0, vocab, (tokens,))
    hidden = torch.randn(tokens, 8, requires_grad=True)
    with CpuMeter() as meter:
        chunked_cross_entropy(hidden, head, labels, scale=1.0, finish=FINISHES["nothing"]).backward()
        _, highest = meter.sample()
    assert 16 * vocab * 4 < highest < tokens * vocab * 4 / 4
