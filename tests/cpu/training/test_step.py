"""A step against hand-written loops over transformers' own loss and torch's own optimizer."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from brim.errors import RecipeError
from brim.layers import chunked_loss
from brim.models import describe
from brim.recipe import Memory, Optimizer, Precision, Recipe
from brim.training.batches import Batch, synthetic_batch
from brim.training.build import Workload
from brim.training.step import batch_loss, train_step

MakeRecipe = Callable[..., Recipe]
MakeWorkload = Callable[[Recipe], Workload]
FAMILIES = ("llama", "gpt2", "gemma2", "gemma3", "granite", "t5")
BF16 = Precision(weights="bf16", compute="bf16")
CHUNKED = Memory(loss="chunked")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, as in a large batch."""
    monkeypatch.setattr(chunked_loss, "_CHUNK_BYTES", 1)


def batch_of(recipe: Recipe, seed: int = 0) -> Batch:
    return synthetic_batch(recipe, describe(recipe.model), seed=seed)


def weights(workload: Workload) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in workload.model.named_parameters()}


def stream_batch(recipe: Recipe, seed: int = 0) -> tuple[Batch, Tensor]:
    """A batch whose labels are the next tokens, and the stream of T + 1 tokens behind it, as transformers wants it."""
    stream = torch.randint(0, 257, (recipe.micro_batch_size, recipe.seq_len + 1), generator=_seeded(seed))
    labels = stream[:, 1:]
    return Batch(input_ids=stream[:, :-1], labels=labels, num_targets=labels.numel()), stream


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def transformers_loss(model: nn.Module, recipe: Recipe, batch: Batch, stream: Tensor | None) -> Tensor:
    if stream is None:
        result = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    else:
        result = model(input_ids=stream, labels=stream)
    loss: Tensor = result.loss
    return loss


@pytest.mark.parametrize("family", FAMILIES)
def test_full_and_chunked_loss_are_equal(family: str, make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """The chunked loss changes neither the loss nor any gradient, whatever the family does to its logits."""
    results = []
    for memory in (Memory(), CHUNKED):
        recipe = make_recipe(family, memory=memory)
        workload = make_workload(recipe)
        workload.model.eval()
        loss = batch_loss(workload, batch_of(recipe), 7)
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in workload.trainable.items()}))
    (full, full_gradients), (chunked, chunked_gradients) = results
    torch.testing.assert_close(chunked, full, rtol=1e-5, atol=0)
    torch.testing.assert_close(chunked_gradients, full_gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_known_finish_is_the_models(family: str, make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """The chunked loss knows what each family does after its head, dropout or not; another model is refused."""
    recipe = make_recipe(family, memory=CHUNKED)
    workload, batch = make_workload(recipe), batch_of(recipe)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if family == "t5":
        inputs["decoder_input_ids"] = batch.input_ids
    workload.head.check_finish(workload.model, inputs)
    assert workload.model.training
    workload.head._finish = lambda logits: logits * 1.5
    with pytest.raises(RecipeError, match=r'nearest: memory\.loss = "full"'):
        workload.head.check_finish(workload.model, inputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory", [Memory(), CHUNKED], ids=["full", "chunked"])
def test_step_is_the_textbooks(
    family: str, memory: Memory, make_recipe: MakeRecipe, make_workload: MakeWorkload
) -> None:
    """Three FP32 steps equal transformers' loss, torch's clipping and torch's AdamW, written by hand."""
    settings = Optimizer(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    recipe = make_recipe(family, optimizer=settings, memory=memory)
    workload = make_workload(recipe)
    workload.model.eval()
    theirs = deepcopy(workload.base)
    optimizer = torch.optim.AdamW(theirs.parameters(), weight_decay=0.1, fused=False, foreach=False)
    for step in range(3):
        rate = 1e-2 / (step + 1)
        batch, stream = (batch_of(recipe, step), None) if family == "t5" else stream_batch(recipe, step)
        our_loss = train_step(workload, [batch], learning_rate=rate)
        loss = transformers_loss(theirs, recipe, batch, stream)
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(our_loss, loss.detach(), rtol=1e-4, atol=1e-5)
    expected = dict(theirs.named_parameters())
    assert all(parameter.grad is None for parameter in workload.base.parameters())
    close = torch.cat(
        [
            torch.isclose(p, expected[name], rtol=1e-3, atol=1e-4).flatten()
            for name, p in workload.base.named_parameters()
        ]
    )
    # Adam divides by the gradient's size: where that is nothing (the bias of keys), rounding decides the direction.
    assert close.float().mean() > 0.998


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("memory", [Memory(), CHUNKED], ids=["full", "chunked"])
def test_accumulation_is_a_larger_batch(
    family: str, memory: Memory, make_recipe: MakeRecipe, make_workload: MakeWorkload
) -> None:
    """Three micro-batches of two rows, with unequal numbers of targets, give the gradients of one batch of six rows."""
    sgd_like = Optimizer(max_grad_norm=0.0)
    small = make_recipe(family, memory=memory, grad_accumulation=3, optimizer=sgd_like)
    large = replace(small, micro_batch_size=6, grad_accumulation=1)
    whole = batch_of(large)
    whole.labels[1, 3:] = -100
    whole = replace(whole, num_targets=int((whole.labels != -100).sum()))
    parts = []
    for start in (0, 2, 4):
        part = rows_of(whole, slice(start, start + 2))
        parts.append(replace(part, num_targets=int((part.labels != -100).sum())))
    assert len({part.num_targets for part in parts}) > 1
    one, many = make_workload(large), make_workload(small)
    for workload in (one, many):
        workload.model.eval()
    one_gradients, many_gradients = record_gradients(one), record_gradients(many)
    loss = train_step(one, [whole], learning_rate=1e-3)
    torch.testing.assert_close(train_step(many, parts, learning_rate=1e-3), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(many_gradients, one_gradients, rtol=1e-4, atol=1e-5)


def rows_of(batch: Batch, rows: slice) -> Batch:
    return batch.mapped(lambda tensor: tensor[rows])


def record_gradients(workload: Workload) -> dict[str, Tensor]:
    """Filled with the gradients that the optimizer is about to use."""
    seen: dict[str, Tensor] = {}

    def look(*_: Any) -> None:
        seen.update({name: p.grad.clone() for name, p in workload.trainable.items() if p.grad is not None})

    workload.optimizer._optimizers[0].register_step_pre_hook(look)
    return seen


def test_master_weights_are_an_fp32_optimizer(make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """BF16 with FP32 masters: the FP32 optimizer on BF16 gradients, the weights its result rounded, bit by bit."""
    settings = Optimizer(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.0)
    recipe = make_recipe("llama", optimizer=settings, precision=replace(BF16, master="fp32"))
    workload = make_workload(recipe)
    model = deepcopy(workload.base)
    masters = [nn.Parameter(parameter.detach().float()) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.1, fused=True)
    for step in range(3):
        batch = batch_of(recipe, step)
        train_step(workload, [batch], learning_rate=1e-3)
        logits = model(input_ids=batch.input_ids).logits.flatten(0, 1).float()
        loss = nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="sum") * (1 / batch.num_targets)
        loss.backward()
        for parameter, master in zip(model.parameters(), masters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        for parameter, master in zip(model.parameters(), masters, strict=True):
            parameter.data.copy_(master)
    for ours, theirs in zip(workload.base.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory", [Memory(), CHUNKED], ids=["full", "chunked"])
@pytest.mark.parametrize("precision", [None, replace(BF16, master="fp32")], ids=["fp32", "masters"])
def test_stepping_in_backward_is_stepping_after_it(
    family: str,
    memory: Memory,
    precision: Precision | None,
    make_recipe: MakeRecipe,
    make_workload: MakeWorkload,
) -> None:
    """Three steps in backward end at the very bits of three steps after it, tied weights and chunked heads too."""
    settings = Optimizer(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.0)
    ended = []
    for in_backward in (False, True):
        recipe = make_recipe(family, memory=memory, optimizer=replace(settings, in_backward=in_backward))
        recipe = replace(recipe, precision=precision or recipe.precision)
        workload = make_workload(recipe)
        workload.model.eval()
        for step in range(3):
            train_step(workload, [batch_of(recipe, step)], learning_rate=1e-2 / (step + 1))
            assert all(parameter.grad is None for parameter in workload.model.parameters())
        ended.append(weights(workload))
    after, during = ended
    assert all(torch.equal(during[name], after[name]) for name in after)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_checkpointing_changes_no_gradient(
    family: str,
    kind: Literal["selective", "full"],
    make_recipe: MakeRecipe,
    make_workload: MakeWorkload,
) -> None:
    """Recomputed or kept, the loss and every gradient are the same bits, dropout included."""
    results = []
    for memory in (Memory(), Memory(activation_checkpointing=kind)):
        recipe = make_recipe(family, memory=memory)
        workload = make_workload(recipe)
        torch.manual_seed(0)
        loss = batch_loss(workload, batch_of(recipe), 7)
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in workload.trainable.items()}))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_small_updates_reach_masters_alone(make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """Steps too small for BF16 are lost without masters and add up with them: what masters are for."""
    moved = {}
    for master in ("none", "fp32"):
        recipe = make_recipe("llama", precision=replace(BF16, master=master), optimizer=Optimizer(learning_rate=1e-5))
        workload = make_workload(recipe)
        before = weights(workload)
        for _ in range(40):
            train_step(workload, [batch_of(recipe)], learning_rate=1e-4)
        # Of large weights: BF16's step at 0.5 is 0.004.
        moved[master] = sum(
            int(((after != before[name]) & (before[name].abs() > 0.5)).sum())
            for name, after in weights(workload).items()
        )
    assert moved["fp32"] > 10 * max(1, moved["none"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointing_changes_nothing(
    family: str, method: str, make_recipe: MakeRecipe, make_workload: MakeWorkload
) -> None:
    """With activation checkpointing weights are bitwise those without, dropout included."""
    results = []
    for checkpointing in ("none", "full"):
        memory = Memory(activation_checkpointing=checkpointing)
        recipe = make_recipe(family, method=method, memory=memory)
        torch.manual_seed(3)
        workload = make_workload(recipe)
        for step in range(2):
            train_step(workload, [batch_of(recipe, step)], learning_rate=1e-3)
        results.append(weights(workload))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_autocast_computes_in_bf16(make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """FP32 weights with BF16 compute: the loss of torch's own autocast, FP32 gradients and weights."""
    recipe = make_recipe("llama", precision=Precision(weights="fp32", compute="bf16"))
    workload, (batch, stream) = make_workload(recipe), stream_batch(recipe)
    theirs = deepcopy(workload.base)
    gradients = record_gradients(workload)
    ours = train_step(workload, [batch], learning_rate=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = transformers_loss(theirs, recipe, batch, stream).detach()
    plain = transformers_loss(theirs, recipe, batch, stream).detach()
    torch.testing.assert_close(ours, autocast, rtol=1e-4, atol=0)
    assert abs(ours - plain) > 3 * abs(ours - autocast)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert {parameter.dtype for parameter in workload.base.parameters()} == {torch.float32}


def test_a_recipe_must_go_with_its_model(make_recipe: MakeRecipe, make_workload: MakeWorkload) -> None:
    """Another task, or rows longer than the model's positions, are refused with the nearest that can run."""
    for changes, said in (
        ({"task": "seq2seq-lm"}, 'nearest: task = "causal-lm"'),
        ({"seq_len": 97}, "nearest: seq_len = 96"),
    ):
        with pytest.raises(RecipeError, match=said):
            make_workload(replace(make_recipe("llama"), **changes))


@pytest.mark.parametrize("kind", ["activations", "weights", "all"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("gpt2", {"method": "lora"}), ("t5", {"grad_accumulation": 2})],
    ids=["full", "lora", "accumulated"],
)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_offloading_does_not_change_what_is_learned(
    kind: Literal["activations", "weights", "all"],
    family: str,
    settings: dict[str, Any],
    checkpointing: Literal["none", "full"],
    make_recipe: MakeRecipe,
    make_workload: MakeWorkload,
) -> None:
    """Losses and weights after three steps are those of the recipe that offloads nothing, bit by bit."""
    results = []
    for offload in ("none", kind):
        memory = Memory(activation_checkpointing=checkpointing, offload=offload)
        recipe = make_recipe(family, memory=memory, **settings)
        torch.manual_seed(0)
        workload = make_workload(recipe)
        batches = [batch_of(recipe, seed) for seed in range(recipe.grad_accumulation)]
        losses = [float(train_step(workload, batches, learning_rate=1e-3)) for _ in range(3)]
        results.append((losses, weights(workload)))
    (losses, expected), (ours, found) = results
    assert ours == losses
    assert all(torch.equal(found[name], expected[name]) for name in expected)
