"""What training a model from scratch would take: memory, devices, hours, price, energy. And what can be done instead.

Hours = 6 N D / (devices x peak x utilization). The utilization is no opinion: it is the range that runs with published
GPU hours reached, from `history.utilizations`, which holds failures and restarts too.
"""

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from brim.errors import UsageError
from brim.growth.history import FLOPS_PER_PARAMETER_AND_TOKEN, utilizations
from brim.growth.law import PUBLISHED, REPLICATION
from brim.hardware.catalogue import Accelerator
from brim.numerics.formats import FORMATS

RULE_OF_THUMB_BYTES = 24
"""For each parameter: FP32 weights of 4 bytes, and about six times that to train them (gradients, optimizer, rest)."""
MIXED_STATE_BYTES = 16
"""BF16 weight and gradient, FP32 master and AdamW's two moments: ZeRO (arXiv:1910.02054, section 3.1), without any
activations."""
LORA_TRAINED_SHARE = 0.01
"""Of the parameters that adapters of rank 16 on all linears add, about: 0.3 to 1 % from 70B down to 1B."""
SMALL_CARD_BYTES = 24 * 10**9
LORA_FLOPS_PER_PARAMETER_AND_TOKEN = 4
"""Forward and the gradient of inputs; frozen weights need no gradient."""
LORA_TOKENS = 20 * 10**6
"""Three epochs of Alpaca's 52,002 examples at about 128 tokens each: what people call a fine-tuning."""
QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A range and its middle: low and high are quartiles of the published utilizations."""

    low: float
    middle: float
    high: float

    def times(self, factor: float) -> "Span":
        return Span(low=self.low * factor, middle=self.middle * factor, high=self.high * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Feasibility:
    """Answers for one model on one kind of device."""

    num_parameters: int
    active_parameters: int
    tokens: int
    tokens_are_chosen: bool
    """False: nobody said how many, so the compute-optimal number was taken."""
    gpu: str
    gpu_memory_bytes: int
    num_gpus: int
    weight_bytes: dict[str, int]
    """By number format."""
    rule_bytes: int
    """Training by the rule of thumb: 24 bytes a parameter."""
    state_bytes: int
    """Training in mixed precision, AdamW, activations not counted."""
    small_cards: float
    """Times that a 24 GB card's memory goes into `rule_bytes`."""
    gpus_needed: int
    """To hold `rule_bytes` in equal shards."""
    gpus_needed_for_states: int
    """To hold `state_bytes`: the least with any method that trains all weights by AdamW."""
    flops: float
    optimal_tokens: float
    """Compute-optimal for this many active parameters, by the replication."""
    optimal_tokens_as_published: float
    """By the rounded coefficients of the paper: shown to warn of them."""
    utilization: Span
    """Quartiles of runs with published hours; `low` is the slow end."""
    hours: Span
    """`low` is the fast end, as of everything that follows from it."""
    one_gpu_hours: Span
    price_usd: Span | None
    """None where no price of the device is known."""
    price_per_hour_usd: float | None
    energy_kwh: Span | None
    """At the boards' power limit, the rest of the machines not counted; None where it is unknown."""
    lora_hours_one_gpu: Span
    """Adapters on a frozen 4-bit base, one device, `lora_tokens`."""
    lora_tokens: int
    lora_bytes: int
    """4-bit base, and adapters of about 1 % trained by AdamW in mixed precision; activations not counted."""
    lora_fits_one_gpu: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def feasibility(
    num_parameters: int,
    accelerator: Accelerator,
    *,
    active_parameters: int | None = None,
    tokens: int | None = None,
    num_gpus: int = 1,
    price_per_hour_usd: float | None = None,
    lora_tokens: int = LORA_TOKENS,
) -> Feasibility:
    """Training `num_parameters` on `tokens` (None: compute-optimal) with `num_gpus` devices.

    `active_parameters` (None: all) are those that one token meets. Raises UsageError for a device without a 16-bit
    peak, and for more active parameters than there are.
    """
    active = active_parameters or num_parameters
    if active > num_parameters:
        raise UsageError(f"active parameters {active} exceed the model's {num_parameters}; give at most as many")
    peak = _peak(accelerator)
    chosen = tokens or round(REPLICATION.optimal_tokens(active))
    flops = float(FLOPS_PER_PARAMETER_AND_TOKEN * active) * chosen
    shares, rule, states = utilization(), RULE_OF_THUMB_BYTES * num_parameters, MIXED_STATE_BYTES * num_parameters
    hours = _hours(flops, num_gpus * peak, shares)
    price = price_per_hour_usd or accelerator.price_usd_per_hour
    adapters = _lora_bytes(num_parameters)
    return Feasibility(
        num_parameters=num_parameters,
        active_parameters=active,
        tokens=chosen,
        tokens_are_chosen=tokens is not None,
        gpu=accelerator.name,
        gpu_memory_bytes=accelerator.memory_bytes,
        num_gpus=num_gpus,
        weight_bytes={name: row.nbytes(num_parameters) for name, row in FORMATS.items()},
        rule_bytes=rule,
        state_bytes=states,
        small_cards=rule / SMALL_CARD_BYTES,
        gpus_needed=ceil(rule / accelerator.memory_bytes),
        gpus_needed_for_states=ceil(states / accelerator.memory_bytes),
        flops=flops,
        optimal_tokens=REPLICATION.optimal_tokens(active),
        optimal_tokens_as_published=PUBLISHED.optimal_tokens(active),
        utilization=shares,
        hours=hours,
        one_gpu_hours=hours.times(num_gpus),
        price_usd=hours.times(num_gpus * price) if price else None,
        price_per_hour_usd=price,
        energy_kwh=hours.times(num_gpus * accelerator.power_w / 1000) if accelerator.power_w else None,
        lora_hours_one_gpu=_hours(float(LORA_FLOPS_PER_PARAMETER_AND_TOKEN * active) * lora_tokens, peak, shares),
        lora_tokens=lora_tokens,
        lora_bytes=adapters,
        lora_fits_one_gpu=adapters <= accelerator.memory_bytes,
    )


def utilization() -> Span:
    """Quartiles of the share of peak that runs with published hours reached."""
    shares = [share for _, share in utilizations()]
    low, middle, high = (_quantile(shares, part) for part in QUARTILES)
    return Span(low=low, middle=middle, high=high)


def _peak(accelerator: Accelerator) -> float:
    for name in ("bf16", "fp16"):
        if name in accelerator.peak_flops:
            return accelerator.peak_flops[name]
    raise UsageError(f"GPU {accelerator.name}: no 16-bit peak is known, so hours cannot be told; name another GPU")


def _hours(flops: float, peak: float, shares: Span) -> Span:
    """The fast end is that of the high utilization."""
    return Span(
        low=flops / (peak * shares.high) / 3600,
        middle=flops / (peak * shares.middle) / 3600,
        high=flops / (peak * shares.low) / 3600,
    )


def _lora_bytes(num_parameters: int) -> int:
    return FORMATS["nf4"].nbytes(num_parameters) + round(LORA_TRAINED_SHARE * MIXED_STATE_BYTES * num_parameters)


def _quantile(ordered: list[float], part: float) -> float:
    """Of ascending values, by linear interpolation."""
    place = part * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
