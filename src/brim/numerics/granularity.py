"""Granularity: which elements of a weight share one scale. Shapes: R output channels, K inputs."""

from dataclasses import dataclass

from brim.errors import UsageError


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for all: (R, K) -> (1,)."""

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        return (1,)


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale per output channel: (R, K) -> (R, 1)."""

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        return (shape[0], 1)


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale per `size` inputs of a channel: (R, K) -> (R, K / size)."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"group size {self.size} is not 1 or more; write for example group:64")

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Raises UsageError where groups do not fill a row."""
        if shape[1] % self.size:
            raise UsageError(f"rows of {shape[1]} elements do not divide into groups of {self.size}")
        return (shape[0], shape[1] // self.size)


Granularity = PerTensor | PerChannel | PerGroup


def granularity_name(granularity: Granularity) -> str:
    """What `parse_granularity` reads as this one."""
    match granularity:
        case PerGroup(size):
            return f"group:{size}"
        case PerChannel():
            return "channel"
        case PerTensor():
            return "tensor"


def parse_granularity(text: str) -> Granularity:
    """`tensor`, `channel` or `group:32`. Raises UsageError."""
    match text.partition(":"):
        case ("tensor", "", ""):
            return PerTensor()
        case ("channel", "", ""):
            return PerChannel()
        case ("group", ":", size) if size.isdecimal():
            return PerGroup(int(size))
        case _:
            raise UsageError(f"granularity {text!r} is not tensor, channel or group:SIZE; write for example group:64")
