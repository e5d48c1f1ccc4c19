"""Peaks and step times of many recipes of one model, by closed form: two numbers each, no ledgers.

Recipes that differ in rows alone are one kind. What kinds have in common is counted once: what flows through a
micro-batch does not depend on the optimizer, what is held from step to step not on the rows. The numbers are those of
`estimate`, to the byte (tests/pure/test_sweep.py); it is asked where a kind has no closed form of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from brim.hardware.device import Device
from brim.memory import closed_form, kept, sharded
from brim.memory.anatomy import anatomy
from brim.memory.constants import context_bytes, cublas_workspace_bytes
from brim.memory.offloaded import split
from brim.memory.rough import block_bytes, closed_form_knows, table_bytes
from brim.memory.tensor import whole_of
from brim.models.spec import ModelSpec
from brim.planning.estimate import on_device
from brim.recipe import Parallel, Recipe
from brim.report import Ledger
from brim.speed.communication import talk_of
from brim.speed.roofline import crossing, micro_batch_work, optimizer_traffic, step_time

Batch = tuple[int, int]
"""Rows of a micro-batch, and micro-batches of a step."""
_Flow = tuple[tuple[tuple[str, int, int, int], ...], int]
"""Of each moment its name, activations, loss with workspace, and gradients; and the batch's own bytes."""
_NO_BOUND = 2**62


class Numbers(NamedTuple):
    peak_bytes: int
    """Of the device: what `Peak.highest_bytes` says."""
    seconds: float
    """Of an optimizer step."""


class _Stays(NamedTuple):
    """What offloading leaves on the device."""

    weights: int
    holds_states: bool = True
    gradients: int = _NO_BOUND
    """At most."""
    row_activations: int = _NO_BOUND
    """At most, for each row of a micro-batch."""


class Sweep:
    """Of one model on one device; remembers what its questions have in common."""

    def __init__(self, spec: ModelSpec, device: Device) -> None:
        self._spec, self._device = spec, device
        self._flows: dict[object, _Flow] = {}
        self._works: dict[object, tuple[int, int]] = {}
        on_gpu = device.kind == "cuda"
        self._beside = 2 * cublas_workspace_bytes(device) + context_bytes(device) if on_gpu else 0

    def numbers(self, kind: Recipe, batches: Sequence[Batch]) -> list[Numbers]:
        """Of this recipe with each of these batches in place of its own."""
        if not closed_form_knows(self._spec, kind):
            return [Numbers(self._asked(recipe), step_time(self._spec, recipe, self._device))
                    for recipe in (with_batch(kind, batch) for batch in batches)]  # fmt: skip
        spec, alone = whole_of(self._spec, kind)
        return list(map(Numbers, self._peaks(kind, spec, alone, batches), self._times(kind, spec, alone, batches)))

    def _asked(self, recipe: Recipe) -> int:
        return on_device(self._spec, recipe, self._device)[0].total + self._beside

    def _stays(self, step: closed_form.Step) -> "_Stays":
        """By the same split as `memory.offloaded`'s."""
        memory, stays = step.recipe.memory, _Stays(weights=step.weights)
        if self._device.kind != "cuda" or memory.offload == "none":
            return stays
        if memory.offloads_activations:
            one = replace(step.recipe, micro_batch_size=1, grad_accumulation=1)
            stays = stays._replace(row_activations=block_bytes(self._spec, one))
        if memory.offloads_weights:
            tables = min(step.weights, table_bytes(self._spec, step.recipe))
            fetched = (step.weights - tables) // max(1, self._spec.num_layers)
            stays = stays._replace(weights=tables + fetched, gradients=tables + fetched)
        return stays._replace(holds_states=not memory.offloads_optimizer)

    def _peaks(self, kind: Recipe, spec: ModelSpec, alone: Recipe, batches: Sequence[Batch]) -> Iterator[int]:
        parallel = alone.parallel
        if parallel.data_ranks == 1:
            return self._whole(spec, alone, batches, shards=1, least_turns=1)
        if parallel.copies_weights:
            one = replace(alone, parallel=Parallel())
            return self._whole(spec, one, batches, shards=parallel.state_shards, least_turns=2)
        return self._divided(spec, alone, batches)

    def _whole(
        self, spec: ModelSpec, recipe: Recipe, batches: Sequence[Batch], *, shards: int, least_turns: int
    ) -> Iterator[int]:
        """A device with all the weights."""
        steps = {gathers: closed_form.step_of(spec, _turning(recipe, gathers)) for gathers in _gathers(batches)}
        if least_turns > 1:
            steps = dict.fromkeys((False, True), closed_form.step_of(spec, _turning(recipe, True)))
        step = next(iter(steps.values()))
        stays = self._stays(step)
        held = stays.weights + (step.optimizer_states // shards if stays.holds_states else 0) + self._beside
        ranges = {gathers: step.gradient_range for gathers, step in steps.items()}
        stepping = step.at_optimizer()
        for rows, turns in batches:
            moments, batch_bytes = self._flow(step, rows)
            least, most = ranges[turns > 1]
            most, kept_bytes = min(most, stays.gradients), rows * stays.row_activations
            peak = stepping.workspace + min(max(stepping.gradients, least), most)
            for _, activations, beside, gradients in moments:
                peak = max(peak, min(activations, kept_bytes) + beside + min(max(gradients, least), most))
            yield held + batch_bytes + peak

    def _left(self, ledger: Ledger, recipe: Recipe) -> int:
        """Bytes on the device of what does not depend on rows."""
        if self._device.kind == "cuda" and recipe.memory.offload != "none":
            ledger, _ = split(ledger, self._spec, recipe)
        return ledger.total + self._beside

    def _divided(self, spec: ModelSpec, recipe: Recipe, batches: Sequence[Batch]) -> Iterator[int]:
        """A device with its share of the weights."""
        one = closed_form.step_of(spec, sharded.alone_of(recipe))
        stepping = one.at_optimizer().workspace
        besides: dict[bool, dict[str, int]] = {}
        for gathers in _gathers(batches):
            rank = sharded.Sharded(spec=spec, recipe=_turning(recipe, gathers), terms=one.terms)
            names = [name for name, *_ in self._flow(one, 1)[0]]
            held = {"start": rank.at_start(), "step": rank.ledger(gradients=rank.divided(rank.trained))}
            for name in names:
                gradients, gathered = rank.beside(name)
                held[name] = rank.ledger(gradients=gradients, gathered=gathered)
            besides[gathers] = {name: self._left(ledger, recipe) for name, ledger in held.items()}
        row_activations = self._stays(one).row_activations
        for rows, turns in batches:
            moments, batch_bytes = self._flow(one, rows)
            beside, kept_bytes = besides[turns > 1], rows * row_activations
            peak = max(beside["start"], beside["step"] + (stepping + batch_bytes) // rank.ranks)
            for name, activations, loss, _ in moments:
                peak = max(peak, beside[name] + min(activations, kept_bytes) + loss + batch_bytes)
            yield peak

    def _flow(self, step: closed_form.Step, rows: int) -> _Flow:
        key = _flow_key(step.spec, step.recipe, rows)
        if key not in self._flows:
            wide = replace(step, terms=replace(step.terms, rows=rows))
            moments = tuple(
                (name, moment.activations, moment.loss + moment.workspace, moment.gradients)
                for name, moment in wide.flowing().items()
            )
            self._flows[key] = moments, wide.batch_bytes
        return self._flows[key]

    def _times(self, kind: Recipe, spec: ModelSpec, alone: Recipe, batches: Sequence[Batch]) -> Iterator[float]:
        terms = kept.terms(anatomy(spec), alone)
        stepped = optimizer_traffic(spec, alone, terms) // alone.parallel.state_shards
        crosses = crossing(self._spec, kind) if self._device.kind == "cuda" and kind.memory.offload != "none" else None
        talk = talk_of(self._spec, kind, self._device)
        flops_per_s = self._device.flops[kind.precision.compute]
        for rows, turns in batches:
            key = _flow_key(spec, alone, rows)
            if key not in self._works:
                self._works[key] = micro_batch_work(alone, replace(terms, rows=rows))
            flops, traffic = self._works[key]
            bytes_s = float(turns * traffic + stepped) / self._device.bandwidth_bytes_per_s
            working_s = float(turns * flops) / flops_per_s + bytes_s
            working_s += crosses.seconds(rows=rows, turns=turns) if crosses else 0.0
            yield talk.around(working_s, rows=rows, turns=turns)


def with_batch(kind: Recipe, batch: Batch) -> Recipe:
    """The recipe of this kind with these rows."""
    return replace(kind, micro_batch_size=batch[0], grad_accumulation=batch[1])


def _gathers(batches: Sequence[Batch]) -> set[bool]:
    """Whether micro-batches are accumulated: what kinds of batches there are."""
    return {turns > 1 for _, turns in batches}


def _turning(recipe: Recipe, gathers: bool) -> Recipe:
    return replace(recipe, grad_accumulation=2 if gathers else 1)


def _flow_key(spec: ModelSpec, recipe: Recipe, rows: int) -> object:
    """All that decides what flows through a micro-batch, of one model: its share's width, and what the terms read."""
    precision, memory = recipe.precision, recipe.memory
    return (
        rows, spec.num_heads, recipe.method, precision.weights, precision.compute, memory.activation_checkpointing,
        memory.loss, memory.attention, recipe.seq_len, recipe.target_seq_len, recipe.lora, recipe.qat,
        recipe.training.packing, recipe.library.frozen,
    )  # fmt: skip
