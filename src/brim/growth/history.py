"""Released language models: parameters, tokens, compute and GPU hours that somebody published (data/SOURCE.md)."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from brim.hardware.catalogue import lookup

FLOPS_PER_PARAMETER_AND_TOKEN = 6
"""A multiplication and an addition, once forward and twice backward (Kaplan et al., arXiv:2001.08361, section 2.1)."""
ENCODER_DECODER_SHARE = 0.5
"""Of an encoder-decoder's parameters, those a token meets: its own stack's (GPT-3, arXiv:2005.14165, table D.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One model; None where nobody said."""

    model: str
    organisation: str
    date: float
    """Year and its part: the middle of the month of release."""
    num_parameters: float | None
    active_parameters: float | None
    """That one token meets: without the experts it is not sent to, all of them in a dense model; None: not public."""
    is_encoder_decoder: bool
    tokens: float | None
    flops: float | None
    gpu: str
    gpu_hours: float | None
    source: str

    @property
    def utilization(self) -> float | None:
        """6 x active parameters x tokens over what its GPUs could have done in their hours, at the maker's peak.

        Half of that for an encoder-decoder. None where hours, tokens or the GPU's 16-bit peak are unknown.
        Recomputation is not work done; failures and restarts are hours spent: both lower it.
        """
        accelerator = lookup(self.gpu) if self.gpu else None
        if accelerator is None or not (self.gpu_hours and self.tokens and self.active_parameters):
            return None
        peak = accelerator.peak_flops.get("bf16") or accelerator.peak_flops.get("fp16")
        if peak is None:
            return None
        met = self.active_parameters * (ENCODER_DECODER_SHARE if self.is_encoder_decoder else 1)
        work = FLOPS_PER_PARAMETER_AND_TOKEN * met * self.tokens
        return work / (self.gpu_hours * 3600 * peak)


@cache
def releases() -> Sequence[Release]:
    """All rows, oldest first."""
    text = resources.files("brim.growth").joinpath("data", "model_history.csv").read_text(encoding="utf-8")
    return tuple(sorted(map(_release, csv.DictReader(text.splitlines())), key=lambda release: release.date))


def utilizations() -> list[tuple[str, float]]:
    """(model, share of peak) of every run whose hours and tokens are public, lowest first."""
    found = [(release.model, release.utilization) for release in releases()]
    return sorted(((model, share) for model, share in found if share is not None), key=lambda pair: pair[1])


def _release(row: dict[str, str]) -> Release:
    parameters = _number(row["params"])
    active = None if row["active_params"] == "unknown" else _number(row["active_params"]) or parameters
    return Release(
        model=row["model"],
        organisation=row["organisation"],
        date=int(row["year"]) + (int(row["month"]) - 0.5) / 12,
        num_parameters=parameters,
        active_parameters=active,
        is_encoder_decoder=row["encoder_decoder"] == "yes",
        tokens=_number(row["train_tokens"]),
        flops=_number(row["train_flops"]),
        gpu=row["gpu_type"],
        gpu_hours=_number(row["gpu_hours"]),
        source=row["source"],
    )


def _number(text: str) -> float | None:
    return float(text) if text else None
