"""`calibrate`: codes and scales of a decoder's linear weights, chosen by what flows through them on a text.

Block after block: a pass over the text gathers the second moments of each linear module's inputs; scales are searched
with the mean square of each input as its importance; codes are chosen with error feedback (GPTQ, numerics/feedback.py);
a second pass hands the block's outputs, with the weights as a reader will see them, to the next, so later blocks make
up for what earlier ones lost. One block is held at a time; hidden states are in a file.
Shapes: N sequences, T tokens, D hidden size, R rows, K inputs, G groups of a row.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from brim import __version__
from brim.checkpoints.conversion import Conversion, Integers
from brim.checkpoints.decisions import Decisions, DecisionWriter, found
from brim.checkpoints.decoder import BlockwiseDecoder, HiddenStates
from brim.checkpoints.job import Job
from brim.checkpoints.targets import TOKENS, CalibrationText
from brim.errors import DataError, DoesNotFitError
from brim.models.directory import StoredTensor, stored_tensors
from brim.models.quiet import quiet_transformers
from brim.models.spec import ModelSpec
from brim.numerics.encode import all_codes, decode
from brim.numerics.feedback import feedback_codes
from brim.numerics.granularity import PerGroup
from brim.numerics.scales import least_error_scale
from brim.publish import check_room, whole_directory
from brim.units import Progress, format_bytes, no_progress

SEQUENCE_TOKENS = 512


def decisions_of(place: Path) -> Path:
    """Where it is kept what calibration decided for the output `place`."""
    return place.with_name(f".{place.name}.calibration")


def calibrate(
    source: Path,
    spec: ModelSpec,
    job: Job,
    place: Path,
    *,
    text: CalibrationText,
    memory_bytes: int,
    resume: bool = False,
    progress: Progress = no_progress,
) -> Decisions:
    """Codes and scales of the job's integers that are in the decoder's blocks, in the new directory `place`.

    What an earlier run left there is used again with `resume` if it is whole and of the same work; a calibration that
    was itself killed starts anew. `progress` counts sequences times blocks, twice each. The same bytes come out each
    time with the same number of threads.
    Raises UsageError for families that do not run block by block, DoesNotFitError where a block and what is gathered of
    it do not fit `memory_bytes`, DataError for a text of less than a sequence.
    """
    stored = {tensor.spec.name: tensor for tensor in stored_tensors(source)}
    decoder = BlockwiseDecoder(spec, stored)
    tokens_NT = sequences(source, text, limit=decoder.max_tokens)
    identity = _identity(job, tokens_NT, stored.values())
    if resume and (earlier := found(place)) and earlier.identity == identity:
        return earlier
    wanted = {c.source.spec.name: c for c in job.conversions if c.integers is not None}
    _check_memory(decoder, wanted, tokens=tokens_NT.shape[1], memory_bytes=memory_bytes)
    # The output's room too: a calibration takes long, and would be for nothing.
    need_bytes = 2 * sum(conversion.source.spec.numel for conversion in wanted.values())
    need_bytes += 4 * tokens_NT.numel() * decoder.hidden_size + sum(file.nbytes for file in job.files)
    check_room(place.parent, need_bytes, what="the output with its calibration")
    shutil.rmtree(place, ignore_errors=True)
    with whole_directory(place) as partial:
        writer = DecisionWriter(partial)
        _decide(decoder, tokens_NT, wanted, writer, partial / "hidden", progress)
        writer.close(identity)
    return Decisions(place)


def sequences(source: Path, text: CalibrationText, *, limit: int = SEQUENCE_TOKENS) -> Tensor:
    """(N, T) of the text's beginning. Raises DataError where it is too short."""
    length = min(SEQUENCE_TOKENS, limit)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
        ids = tokenizer(text.text, verbose=False)["input_ids"][: max(text.max_tokens, length)]
    if len(ids) < length:
        raise DataError(
            f"the calibration text has {len(ids)} tokens, and a sequence {length}; give more text, best some "
            f"{TOKENS:,} tokens of the kind that the model is for"
        )
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _identity(job: Job, tokens_NT: Tensor, stored: Iterable[StoredTensor]) -> dict[str, Any]:
    paths = sorted({tensor.path for tensor in stored})
    facts = [(path, path.stat()) for path in paths]
    identity = {
        "brim": __version__,
        "settings": job.settings,
        "tokens": tokens_NT.numel(),
        "text": hashlib.sha256(tokens_NT.numpy().tobytes()).hexdigest(),
        "source": [[path.name, status.st_size, status.st_mtime_ns] for path, status in facts],
    }
    return dict(json.loads(json.dumps(identity)))


def _check_memory(
    decoder: BlockwiseDecoder, wanted: Mapping[str, Conversion], *, tokens: int, memory_bytes: int
) -> None:
    """Raises DoesNotFitError where the neediest block takes more."""
    need = max(block_bytes(block, tokens=tokens) for block in decoder.blocks)
    if need > memory_bytes:
        raise DoesNotFitError(
            f"calibration holds a block of the model with what it gathers, {format_bytes(need)}, and --memory allows "
            f"{format_bytes(memory_bytes)}; allow more, or use --scales mse"
        )


def block_bytes(block: nn.Module, *, tokens: int) -> int:
    """Weights; moments of each linear module's inputs; then the larger of a pass and a choice of codes.

    The choice takes some nine tensors of the weight's shape and, of the moments' shape in FP64, four.
    """
    shapes = [module.weight.shape for module in block.modules() if isinstance(module, nn.Linear)]
    weights = 4 * sum(parameter.numel() for parameter in block.parameters())
    moments = 4 * sum(inputs**2 for _, inputs in shapes)
    passing = 4 * tokens * sum(rows + inputs for rows, inputs in shapes)
    choosing = max(36 * rows * inputs + 32 * inputs**2 for rows, inputs in shapes)
    return weights + moments + max(passing, choosing)


@torch.inference_mode()
def _decide(
    decoder: BlockwiseDecoder,
    tokens_NT: Tensor,
    wanted: Mapping[str, Conversion],
    writer: DecisionWriter,
    path: Path,
    progress: Progress,
) -> None:
    count, done = len(tokens_NT), 0
    total = 2 * count * len(decoder.blocks)
    with HiddenStates(path, tokens=tokens_NT.shape[1], width=decoder.hidden_size) as states:
        for number, tokens_T in enumerate(tokens_NT):
            states[number] = decoder.embedded(tokens_T)
        for block in decoder.blocks:
            with decoder.loaded(block) as linears:
                with Moments({name: linear for name, linear in linears.items() if name in wanted}) as moments:
                    for number in range(count):
                        decoder.run(block, states[number])
                        done += 1
                        progress(done, total)
                for name in moments.names:
                    _choose(name, linears[name], moments.of(name) / tokens_NT.numel(), wanted[name], writer)
                del moments
                for number in range(count):
                    states[number] = decoder.run(block, states[number])
                    done += 1
                    progress(done, total)


def _choose(name: str, linear: nn.Linear, power_KK: Tensor, conversion: Conversion, writer: DecisionWriter) -> None:
    """Decide on one weight, write it down, and give the module what a reader will see."""
    integers = conversion.integers
    assert integers is not None, name
    weight_RK = linear.weight.data
    scale_RG = choose_scales(weight_RK, power_KK, integers)
    codes_RK = feedback_codes(weight_RK, scale_RG, power_KK, codes=all_codes(integers.format))
    writer.add(name, codes_RK, scale_RG)
    weight_RK.copy_(decode(codes_RK, scale_RG, granularity=integers.granularity))


def choose_scales(weight_RK: Tensor, power_KK: Tensor, integers: Integers) -> Tensor:
    """(R, G) in the dtype stored: least error weighted by each input's mean square, that is, of the outputs if inputs
    never varied together."""
    size = integers.granularity.size if isinstance(integers.granularity, PerGroup) else weight_RK.shape[1]
    return least_error_scale(
        weight_RK.unflatten(-1, (-1, size)),
        codes=all_codes(integers.format),
        dtype=integers.scale_dtype,
        importance=power_KK.diagonal().view(1, -1, size),
    ).squeeze(-1)


class Moments:
    """Second moments of the inputs of linear modules, while they run; modules that share an input share them."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._holder: dict[str, str] = {}
        self._last: tuple[Tensor | None, str] = (None, "")
        self._hooks = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in linears.items()]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._holder)

    def of(self, name: str) -> Tensor:
        """X^T X, (K, K)."""
        return self._sums[self._holder[name]]

    def _hook(self, name: str) -> Any:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0] is self._last[0]:
                self._holder[name] = self._last[1]
                return
            self._last = (args[0], name)
            self._holder[name] = name
            x_TK = args[0].flatten(0, -2).float()
            if name not in self._sums:
                self._sums[name] = x_TK.new_zeros(x_TK.shape[1], x_TK.shape[1])
            with torch.autocast(x_TK.device.type, enabled=False):
                self._sums[name].addmm_(x_TK.t(), x_TK)

        return before

    def __enter__(self) -> "Moments":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = (None, "")
