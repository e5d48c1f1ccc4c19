"""Recipe -> Prediction: the trainer's own builder and step, run on fake tensors under the meter of lifetimes.

Two steps are run: the optimizer's state appears in the first, the steady peak in the second. Of a long model whose
blocks repeat, three short ones are run instead, and their traces continued: the same trace, event by event.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from peft import PeftModel
from transformers import PreTrainedModel

from brim.errors import RecipeError
from brim.hardware import Device
from brim.inference.packed import packer_of, rearrange, settle
from brim.inference.rehearsed import KV_CACHE, Written, check_room, rehearse_writing
from brim.layers import one_kernel
from brim.memory import owners
from brim.memory.allocator import replay
from brim.memory.bands import DEFAULT_RISK, gpu_band
from brim.memory.constants import context_bytes, nccl_bytes
from brim.memory.cuda import cuda_kernels
from brim.memory.fake import FakeWorld
from brim.memory.modules import ModuleWatch, rows_at
from brim.memory.scratch import scratch_bytes
from brim.memory.splice import continued
from brim.memory.trace import Trace
from brim.models import ModelSpec
from brim.models.series import Series, series
from brim.models.skeleton import DTYPES, skeleton
from brim.recipe import Recipe, Writing
from brim.report import Inference, Ledger, ModuleRow, Moment, Peak, Prediction
from brim.speed import step_time, writing_time
from brim.speed.bands import GPU_OPERATORS, OPERATORS, roofline_basis, time_range
from brim.speed.gpu import gpu_seconds
from brim.speed.operators import OperatorMeter, StepWork, continued_work
from brim.training.adapters import add_lora
from brim.training.batches import Batch, synthetic_batch
from brim.training.build import Workload, base_model, build
from brim.training.checkpoint import kept, wrong_weight
from brim.training.evaluation import loss_over
from brim.training.merge import merged_tensors
from brim.training.ranks import group_sizes, imagined_ranks
from brim.training.step import train_step

ERROR_BAND = (-0.001, 0.001)
"""On a CPU, this one: what a 16-bit product takes inside itself is asked of the processor that is here.

Held by the tests against the profiler's allocation peak, for every lever and family they build; docs/exactness.md has
the whole matrix.
"""


def rehearse(
    spec: ModelSpec, recipe: Recipe, *, device: Device, budget_bytes: int, risk: float = DEFAULT_RISK
) -> Prediction:
    """The ledger of exactly this recipe. Nothing is read or downloaded, and no weights exist.

    `risk`: the share of published runs that may lie above the upper bound of a GPU's peak.
    """
    meter = OperatorMeter()
    trace = rehearse_trace(spec, recipe, device=device, operators=meter, whole_run=True)
    peak, ledger, _, moments = _peak_on(device, trace, recipe)
    seconds, basis = _step_time(spec, recipe, device, meter.work)
    return Prediction(
        model=spec.name,
        recipe=recipe.to_dict(),
        device_name=device.name,
        budget_bytes=budget_bytes,
        peak=peak,
        ledger=ledger,
        step_time_s=seconds,
        step_time_range_s=time_range(seconds, basis=basis, identity=device.identity),
        step_time_basis=basis,
        tokens_per_s=recipe.tokens_per_step / seconds,
        method="rehearsal",
        error_band=_error_band(spec, recipe, device, risk),
        reasons=(*recipe.warnings(), *_offload_in_vain(recipe, device)),
        moments=tuple(Moment(name=name, allocated_bytes=nbytes) for name, nbytes in moments),
    )


def _error_band(
    spec: ModelSpec, recipe: Recipe, device: Device, risk: float, *, inference: bool = False
) -> tuple[float, float]:
    if device.kind == "cpu":
        return ERROR_BAND
    return gpu_band(recipe, risk=risk, inference=inference)


def _step_time(spec: ModelSpec, recipe: Recipe, device: Device, work: StepWork) -> tuple[float, str]:
    """Seconds of an optimizer step, and what they were told from."""
    if device.kind == "cuda":
        return gpu_seconds(work, spec, recipe, device), GPU_OPERATORS
    if device.operators is None:
        return step_time(spec, recipe, device), roofline_basis(device)
    return work.seconds(device.operators), OPERATORS


def _offload_in_vain(recipe: Recipe, device: Device) -> list[str]:
    if device.kind == "cpu" and recipe.memory.offload != "none":
        return ["memory.offload saves nothing on a CPU, whose memory is the host's: it costs copies"]
    return []


def peak_on(device: Device, trace: Trace, recipe: Recipe) -> tuple[Peak, Ledger]:
    """A trace's peaks on a device, and the ledger of the highest."""
    peak, ledger, *_ = _peak_on(device, trace, recipe)
    return peak, ledger


def _peak_on(device: Device, trace: Trace, recipe: Recipe) -> tuple[Peak, Ledger, int, Sequence[tuple[str, int]]]:
    """A trace's peaks on a device, the ledger of the highest (allocated on a CPU, device on a GPU), when that was, and
    the allocated peaks of the run's moments.

    On a GPU the lines are those of the moment of the allocated peak; what the allocator reserved beyond the bytes
    that were then in use (at any time: it keeps what it has) is `fragmentation`, and NCCL's buffers are `context`.
    """
    if device.kind == "cpu":
        peak = Peak(allocated_bytes=trace.peak_bytes)
        return peak, trace.peak_ledger(), trace.peak_index, trace.moment_peaks()
    context = context_bytes(device) + nccl_bytes(group_sizes(recipe))
    held = replay(trace, limit_bytes=device.memory_bytes - context)
    ledger = trace.ledger_at(held.peak_index)
    peak = Peak(
        allocated_bytes=held.allocated_bytes,
        reserved_bytes=held.reserved_bytes,
        device_bytes=held.reserved_bytes + context,
        host_bytes=None if trace.host is None else trace.host.peak_bytes,
    )
    whole = replace(ledger, context=context, fragmentation=held.reserved_bytes - ledger.total)
    return peak, whole, held.peak_index, held.moments


def rehearse_trace(
    spec: ModelSpec,
    recipe: Recipe,
    *,
    steps: int = 2,
    device: Device | None = None,
    operators: OperatorMeter | None = None,
    by_module: bool = False,
    whole_run: bool = False,
) -> Trace:
    """Every allocation and free of the build and of `steps` optimizer steps, by owner.

    None as the device: a CPU. `operators` hears of the last step's operators. `by_module`: blocks know their module,
    for which every block is run. `whole_run`: what else a run does follows the steps (`_conclude`).
    """
    if not by_module and goes_block_by_block(recipe) and (shorter := series(spec, task=recipe.task)):
        spliced = splice(shorter, recipe, steps=steps, device=device, operators=operators, whole_run=whole_run)
        if spliced is not None:
            return spliced
    return whole_trace(
        spec, recipe, steps=steps, device=device, operators=operators, by_module=by_module, whole_run=whole_run
    )


def splice(
    shorter: Series,
    recipe: Recipe,
    *,
    steps: int = 2,
    device: Device | None = None,
    operators: OperatorMeter | None = None,
    whole_run: bool = False,
) -> Trace | None:
    """The whole model's trace from short ones, and its operators; None where these do not show it."""
    traces, works = list[Trace](), list[StepWork]()
    for more, spec in enumerate(shorter.specs):
        if more == 0 and recipe.parallel.sharding != "none":
            continue  # a sharded block gathers the next one ahead: a model of one block is unlike the rest
        meter = None if operators is None else OperatorMeter()
        traces.append(whole_trace(spec, recipe, steps=steps, device=device, operators=meter, whole_run=whole_run))
        works.append(StepWork() if meter is None else meter.work)
        if len(traces) < 3:
            continue
        times = shorter.times - (more - 2)
        trace = _continued(traces[-3:], times)
        work = continued_work((works[-3], works[-2], works[-1]), times=times)
        if trace is not None and work is not None:
            if operators is not None:
                operators.work = work
            return trace
    return None


def _continued(traces: Sequence[Trace], times: int) -> Trace | None:
    """The device's trace and, where there is one, the host's."""
    first, second, third = traces
    trace = continued((first, second, third), times=times)
    if trace is not None and first.host is not None and second.host is not None and third.host is not None:
        trace.host = continued((first.host, second.host, third.host), times=times)
        return None if trace.host is None else trace
    return trace


def goes_block_by_block(recipe: Recipe) -> bool:
    """Nothing in the recipe names a block or divides work by bytes instead of by blocks (DDP's buckets, ZeRO-1's
    shares of the parameters), or by many blocks (pipeline stages)."""
    parallel, targets = recipe.parallel, recipe.lora.targets
    return (
        not parallel.copies_weights
        and parallel.pipeline == 1
        and not any(part.isdigit() for target in targets for part in target.split("."))
    )


def whole_trace(
    spec: ModelSpec,
    recipe: Recipe,
    *,
    steps: int = 2,
    device: Device | None = None,
    operators: OperatorMeter | None = None,
    by_module: bool = False,
    whole_run: bool = False,
) -> Trace:
    """`rehearse_trace` with every block run."""
    synthetic = [synthetic_batch(recipe, spec, seed=index) for index in range(recipe.grad_accumulation)]
    with (
        imagined_ranks(recipe) as ranks,  # before the fake world: making a mesh reads numbers from tensors
        FakeWorld() as world,
        owners.listening(world.meter),
        ExitStack() as stack,
    ):
        if device is not None and device.kind == "cuda":
            stack.enter_context(cuda_kernels(device, world.meter))
            if recipe.memory.offload != "none":
                world.meter.trace.host = Trace()
        if device is None or device.kind == "cpu":
            world.meter.inside = scratch_bytes
        trace = world.meter.trace
        workload = build(recipe, spec, ranks=ranks)
        if ranks.mesh is not None:
            world.meter.trace.forget_past()  # real weights are divided while they are read, and never whole
        trace.begin("loading")  # from when all is there: until then, files are mapped, whose pages are the system's
        batches = [batch.mapped(world.bring) for batch in synthetic]
        if operators is not None:
            world.meter.after = operators
            stack.enter_context(one_kernel.listening(operators.kernels))
        watch = ModuleWatch(world.meter, workload.base)
        if by_module:
            stack.enter_context(watch.watching())
            stack.enter_context(owners.listening(watch))
        for step in range(steps):
            if step < 2:
                trace.begin("later steps" if step else "first step")
            if operators is not None:
                operators.start()
            train_step(workload, batches, learning_rate=recipe.optimizer.learning_rate)
        if by_module:
            watch.tag_lasting(workload.optimizer.tensors_of)
        if whole_run and ranks.count == 1:
            world.meter.after = None
            _conclude(workload, batches, trace)
        return trace


def _conclude(workload: Workload, batches: Sequence[Batch], trace: Trace) -> None:
    """What a run of one process does after its steps: evaluation, a checkpoint, and an adapter merged."""
    trace.begin("evaluation")
    loss_over(workload, batches[:1])
    trace.begin("saving")
    wrong_weight(workload)
    kept(workload)
    if isinstance(workload.model, PeftModel):
        trace.begin("merging")
        tensors = list(merged_tensors(workload.model))
        for kind in (True, False):  # one by one, so that the largest of a kind takes the most
            alike = [tensor for tensor in tensors if tensor.is_adapted == kind]
            if alike:
                max(alike, key=lambda tensor: tensor.spec.nbytes).make()


def rehearse_modules(spec: ModelSpec, recipe: Recipe, *, device: Device) -> tuple[ModuleRow, ...]:
    """Bytes by module at the peak, the largest first; together the prediction's ledger. The whole model is run."""
    trace = rehearse_trace(spec, recipe, device=device, by_module=True, whole_run=True)
    _, ledger, index, _ = _peak_on(device, trace, recipe)
    return rows_at(trace, index, ledger)


def rehearse_inference(
    spec: ModelSpec,
    recipe: Recipe,
    *,
    new_tokens: int,
    device: Device,
    budget_bytes: int,
    risk: float = DEFAULT_RISK,
) -> Prediction:
    """The ledger of writing `new_tokens` after `micro_batch_size` rows of `seq_len` tokens each.

    Of the recipe, the weights' format, the attention and adapters count besides. Raises RecipeError for several
    devices.
    """
    if recipe.parallel.devices > 1:
        raise RecipeError(
            f"a model writes on one device, and the recipe has {recipe.parallel.devices}; nearest: parallel.nodes = 1, "
            "parallel.devices_per_node = 1"
        )
    writing = Writing(batch_size=recipe.micro_batch_size, context=recipe.seq_len, new_tokens=new_tokens)
    check_room(spec, writing)
    written = written_trace(spec, recipe, writing, device=device)
    peak, ledger, index, _ = _peak_on(device, written.trace, recipe)
    seconds = writing_time(
        spec,
        recipe,
        new_tokens=new_tokens,
        weight_bytes=ledger.weights,
        cache_bytes=written.kv_cache_bytes,
        device=device,
    )
    return Prediction(
        model=spec.name,
        recipe=recipe.to_dict(),
        device_name=device.name,
        budget_bytes=budget_bytes,
        peak=peak,
        ledger=ledger,
        step_time_s=seconds,
        tokens_per_s=writing.batch_size * new_tokens / seconds,
        method="rehearsal",
        error_band=_error_band(spec, recipe, device, risk, inference=True),
        inference=Inference(
            batch_size=writing.batch_size,
            context=writing.context,
            new_tokens=new_tokens,
            kv_cache_bytes=written.kv_cache_bytes,
            kv_cache_at_peak_bytes=written.trace.bytes_at(index, KV_CACHE),
        ),
    )


def written_trace(spec: ModelSpec, recipe: Recipe, writing: Writing, *, device: Device) -> Written:
    """What writing allocates with this recipe's weights and attention."""
    return rehearse_writing(lambda: writer(spec, recipe, device=device), spec, writing, device=device)


def writer(spec: ModelSpec, recipe: Recipe, *, device: Device | None = None) -> PreTrainedModel:
    """The model that writes, with the recipe's adapters where it has them; inside a fake mode, a fake one.

    What the model's files hold packed is packed here, as it is when they are loaded to generate.
    """
    packer = None if recipe.precision.packed else packer_of(spec, compute=DTYPES[recipe.plain_format])
    if packer is None:
        model = base_model(recipe, spec)
    else:
        model = skeleton(spec, dtype=recipe.plain_format, attention=recipe.memory.attention, swap=packer)
        # a GPU's fake tensors are a CPU's
        arrange = rearrange if device is None or device.kind == "cpu" else settle
        arrange(model)
    if recipe.adapts:
        add_lora(model, recipe)
    return model.eval()
