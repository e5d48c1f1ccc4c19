"""Codes and scales that calibration decided, in a directory beside the output, until a conversion has written them.

The directory appears whole or not at all. `codes` holds the int8 codes of one tensor after the other, `scales` their
scales as FP32 (which holds every stored scale exactly), `index.json` where each tensor's begin and for what work.
"""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from brim.checkpoints.conversion import Conversion, Encoded
from brim.checkpoints.job import Job
from brim.checkpoints.scratch import Scratch
from brim.checkpoints.statistics import compare
from brim.checkpoints.writer import bytes_of
from brim.errors import ModelFileError
from brim.numerics.encode import all_codes, decode

_INDEX, _CODES, _SCALES = "index.json", "codes", "scales"


class _Place(NamedTuple):
    """Of one tensor."""

    codes_at: int
    scales_at: int
    inputs: int
    groups: int


class DecisionWriter:
    """Adds tensors one after the other."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._codes: BinaryIO = (directory / _CODES).open("xb")
        self._scales: BinaryIO = (directory / _SCALES).open("xb")
        self._places: dict[str, _Place] = {}

    def add(self, name: str, codes_RK: Tensor, scale_RG: Tensor) -> None:
        self._places[name] = _Place(self._codes.tell(), self._scales.tell(), codes_RK.shape[1], scale_RG.shape[1])
        self._codes.write(bytes_of(codes_RK.contiguous()))
        self._scales.write(bytes_of(scale_RG.float().contiguous()))

    def close(self, identity: Mapping[str, Any]) -> None:
        """After the last."""
        self._codes.close()
        self._scales.close()
        index = json.dumps({"identity": identity, "tensors": self._places})
        (self._directory / _INDEX).write_text(index, encoding="utf-8")


class Decisions:
    """What was decided, read by rows; by several threads at once."""

    def __init__(self, directory: Path) -> None:
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        self.identity: dict[str, Any] = index["identity"]
        self.directory = directory
        self._places = {name: _Place(*place) for name, place in index["tensors"].items()}

    def rows(self, name: str, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Codes (count, K) and FP32 scales (count, G) of a tensor's rows."""
        place = self._places[name]
        codes = _read(self.directory / _CODES, place.codes_at + first * place.inputs, count * place.inputs)
        scales = _read(self.directory / _SCALES, place.scales_at + 4 * first * place.groups, 4 * count * place.groups)
        return codes.view(torch.int8).view(count, -1), scales.view(torch.float32).view(count, -1)

    def applied_to(self, job: Job) -> Job:
        """The job with these codes and scales in place of those that it would choose."""
        conversions = tuple(
            c.decided(partial(_encode, self, c)) if c.source.spec.name in self._places else c for c in job.conversions
        )
        return job._replace(conversions=conversions, settings=f"{job.settings} {self.identity['text']}")


def found(directory: Path) -> Decisions | None:
    """What an earlier run decided; None where there is nothing whole."""
    try:
        return Decisions(directory)
    except (OSError, ValueError, KeyError):
        return None


def _encode(decisions: Decisions, conversion: Conversion, block_RK: Tensor, first: int, scratch: Scratch) -> Encoded:
    integers = conversion.integers
    assert integers is not None, conversion.source.spec.name
    codes_RK, scale_RG = decisions.rows(conversion.source.spec.name, first, len(block_RK))
    decoded_RK = decode(codes_RK, scale_RG, granularity=integers.granularity)
    size = block_RK.shape[1] // scale_RG.shape[1]
    nearest = (block_RK.float().unflatten(-1, (-1, size)) / scale_RG.unsqueeze(-1)).round_()
    low, high = all_codes(integers.format)
    clipped = int(((nearest < low) | (nearest > high)).sum())
    sums = compare(block_RK, decoded_RK, scratch, clipped=clipped, scale=scale_RG)
    return Encoded((integers.finish(codes_RK), scale_RG.to(integers.scale_dtype)), sums, lambda: decoded_RK)


def _read(path: Path, offset: int, nbytes: int) -> Tensor:
    buffer = bytearray(nbytes)
    with path.open("rb", buffering=0) as file:
        got = os.preadv(file.fileno(), [buffer], offset)
    if got != nbytes:
        raise ModelFileError(f"{path} ended while it was read; run again without --resume")
    return torch.frombuffer(buffer, dtype=torch.uint8) if nbytes else torch.empty(0, dtype=torch.uint8)
