"""What would save most: each lever pulled alone on exactly this recipe, and the peak that is predicted then.

Pure: the predictor is passed in, as to the search. Nothing is guessed: a saving is the difference of two predictions.
A lever is a row: its settings, which the recipe itself may refuse, and what it costs besides time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from brim.errors import BrimError
from brim.hardware.device import Device
from brim.models.spec import ModelSpec
from brim.planning.estimate import estimate
from brim.recipe import Recipe
from brim.report import Advice, Prediction
from brim.units import Progress, no_progress

Predict = Callable[[Recipe], Prediction]
"""Rehearsal or closed form; the same that gave the prediction to improve on."""

SHORT_LIST = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """One change of a recipe that may save memory."""

    settings: Callable[[Recipe, Device], Sequence[str]]
    """`key=value` each; empty where the lever is not there."""
    cost: str


def fixed(*settings: str) -> Callable[[Recipe, Device], Sequence[str]]:
    """The same settings for every recipe."""
    return lambda recipe, device: settings


def smaller_micro_batch(recipe: Recipe, device: Device) -> Sequence[str]:
    """The largest part of the micro-batch that divides it, accumulated: as many rows a step as before."""
    rows = recipe.micro_batch_size
    part = next((part for part in range(rows // 2, 0, -1) if rows % part == 0), 0)
    if part == 0:
        return ()
    return f"micro_batch_size={part}", f"grad_accumulation={recipe.grad_accumulation * rows // part}"


def half_the_length(recipe: Recipe, device: Device) -> Sequence[str]:
    target = (f"target_seq_len={recipe.target_seq_len // 2}",) if recipe.target_seq_len else ()
    return f"seq_len={recipe.seq_len // 2}", *target


def twice_the_gpus(recipe: Recipe, device: Device) -> Sequence[str]:
    """On a CPU the processes would share one memory. Fewer rows are accumulated, where they divide."""
    if device.kind == "cpu":
        return ()
    fewer = () if recipe.grad_accumulation % 2 else (f"grad_accumulation={recipe.grad_accumulation // 2}",)
    return f"parallel.devices_per_node={2 * recipe.parallel.devices_per_node}", "parallel.sharding=zero3", *fewer


def _without_clipping(recipe: Recipe, device: Device) -> Sequence[str]:
    clipping = ("optimizer.max_grad_norm=0.0",) if recipe.optimizer.max_grad_norm else ()
    return "optimizer.in_backward=true", *clipping


LEVERS = (
    Lever(settings=smaller_micro_batch, cost="the same rows a step, in more and smaller turns"),
    Lever(settings=fixed("memory.loss=chunked"), cost="the head's matmul in pieces; the same loss"),
    Lever(
        settings=fixed("memory.activation_checkpointing=selective"), cost="blocks recompute all but linears' results"
    ),
    Lever(settings=fixed("memory.activation_checkpointing=full"), cost="each block runs forward a second time"),
    Lever(settings=fixed("memory.attention=sdpa"), cost="none known: another kernel of the same attention"),
    Lever(settings=fixed("optimizer.name=adamw8bit"), cost="states of 8 bits: nearly the same updates"),
    Lever(settings=fixed("optimizer.name=adafactor"), cost="second moments by row and column, no first; tune its rate"),
    Lever(settings=fixed("optimizer.name=lion"), cost="another optimizer: a third to a tenth of AdamW's learning rate"),
    Lever(settings=_without_clipping, cost="gradients are not clipped: all never exist at once"),
    Lever(settings=fixed("precision.master=none"), cost="updates smaller than the weights' format can tell are lost"),
    Lever(settings=fixed("precision.compute=bf16"), cost="matmuls round to 8 bits of mantissa"),
    Lever(
        settings=fixed("precision.weights=bf16", "precision.compute=bf16"),
        cost="weights and states of 8 bits of mantissa: small updates are lost",
    ),
    Lever(settings=fixed("method=lora"), cost="adapters learn, the weights stay: less can be learned"),
    Lever(
        settings=fixed("method=qlora", "precision.weights=nf4"),
        cost="adapters beside a base rounded to 4 bits: less can be learned",
    ),
    Lever(settings=fixed("memory.offload=optimizer"), cost="gradients cross to the host and weights back each step"),
    Lever(settings=fixed("memory.offload=activations"), cost="what blocks keep crosses to the host and back"),
    Lever(settings=fixed("memory.offload=all"), cost="weights of blocks and what they keep cross in each micro-batch"),
    Lever(settings=half_the_length, cost="texts are cut in half: longer ones are not learned whole"),
    Lever(settings=twice_the_gpus, cost="twice the GPUs, each with its own rows, joined by their link"),
)


def advise(
    spec: ModelSpec,
    recipe: Recipe,
    now: Prediction,
    *,
    device: Device,
    predict: Predict,
    num_tried: int | None = None,
    progress: Progress = no_progress,
) -> tuple[Advice, ...]:
    """Levers that lower the peak of `now`, which is the recipe's, the most saving first.

    `num_tried`: only so many are predicted, those that the closed form thinks most of; None: all. A lever that the
    recipe, the model or the predictor refuses is left out. `progress` counts levers tried.
    """
    pulled = list(_pulled(recipe, device))
    if num_tried is not None:
        pulled = _promising(spec, pulled, now, device)[:num_tried]
    found = []
    for index, (lever, settings, changed) in enumerate(pulled):
        progress(index, len(pulled))
        then = _asked(predict, changed)
        if then is not None and then.peak.highest_bytes < now.peak.highest_bytes:
            found.append(_advice(lever, settings, now, then))
    progress(len(pulled), len(pulled))
    return tuple(sorted(found, key=lambda advice: -advice.saved_bytes))


_Pulled = tuple[Lever, tuple[str, ...], Recipe]


def _pulled(recipe: Recipe, device: Device) -> Iterator[_Pulled]:
    """Levers that change this recipe into another that can run."""
    for lever in LEVERS:
        settings = tuple(lever.settings(recipe, device))
        try:
            changed = recipe.with_settings(settings)
        except BrimError:
            continue
        if changed != recipe:
            yield lever, settings, changed


def _promising(spec: ModelSpec, pulled: list[_Pulled], now: Prediction, device: Device) -> list[_Pulled]:
    """The lightest first by closed form, without those that it does not know."""
    peaks: list[tuple[int, int]] = []
    for index, (_, _, changed) in enumerate(pulled):
        quick = _asked(lambda tried: estimate(spec, tried, device=device, budget_bytes=now.budget_bytes), changed)
        if quick is not None:
            peaks.append((quick.peak.highest_bytes, index))
    return [pulled[index] for _, index in sorted(peaks)]


def _asked(predict: Predict, recipe: Recipe) -> Prediction | None:
    """None where a lever cannot be predicted: the question was about the recipe, and is answered without it."""
    try:
        return predict(recipe)
    except BrimError:
        return None


def _advice(lever: Lever, settings: tuple[str, ...], now: Prediction, then: Prediction) -> Advice:
    return Advice(
        settings=settings,
        cost=lever.cost,
        saved_bytes=now.peak.highest_bytes - then.peak.highest_bytes,
        peak_bytes=then.peak.highest_bytes,
        fits=then.fits,
        step_time_s=then.step_time_s,
        tokens_per_s=then.tokens_per_s,
        method=then.method,
    )
