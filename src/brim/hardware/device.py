"""`Device`: what a recipe runs on, as plain numbers. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from brim.hardware.operator_rates import OperatorRates

DeviceKind = Literal["cpu", "cuda"]
MatmulFormat = Literal["fp32", "bf16", "fp16"]
MATMUL_FORMATS: tuple[MatmulFormat, ...] = get_args(MatmulFormat)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device: its memory and what it achieves (not what its maker says)."""

    name: str
    """Processor or accelerator, as its maker calls it."""
    kind: DeviceKind
    memory_bytes: int
    """All of it, or the user's cap."""
    memory_free_bytes: int
    """What was free when the device was looked at; never more than `memory_bytes`."""
    flops: Mapping[MatmulFormat, float]
    """Achievable floating-point operations a second of matrix products, by format."""
    bandwidth_bytes_per_s: float
    """Achievable traffic, reads and writes added."""
    cores: int
    """Cores that this process may use; 0 for an accelerator."""
    vendor: str = ""
    """Of an accelerator: NVIDIA or AMD."""
    compute_capability: str = ""
    """`9.0`; AMD's own names (`gfx942`); empty for a processor."""
    context_bytes: int | None = None
    """CUDA context, where it was measured on such a device."""
    lacks: frozenset[MatmulFormat] = frozenset()
    """Formats that it does not compute in."""
    link_bytes_per_s: float = 0.0
    """One direction, to the other devices of its machine; 0: not known."""
    operators: OperatorRates | None = None
    """How fast it runs each kind of operator, where it was calibrated."""
    identity: str = ""
    """What decides its speed, as kept measurements are filed: processor, threads, version of torch."""

    @property
    def compute_major(self) -> int | None:
        """9 for `9.0`; None where the device has no CUDA compute capability."""
        major = self.compute_capability.partition(".")[0]
        return int(major) if major.isdigit() else None

    def capped(self, memory_bytes: int | None) -> "Device":
        """The same device with at most this memory; None leaves it as it is."""
        if memory_bytes is None:
            return self
        cap = min(memory_bytes, self.memory_bytes)
        return replace(self, memory_bytes=cap, memory_free_bytes=min(cap, self.memory_free_bytes))
