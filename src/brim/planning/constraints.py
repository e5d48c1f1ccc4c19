"""What the user has decided of a plan, and what of it contradicts itself, the model or the device."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from brim.errors import UsageError
from brim.hardware.device import Device
from brim.memory.tensor import DIVIDED_FAMILIES, can_divide
from brim.models.spec import ModelSpec
from brim.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What the user has decided; the planner decides the rest."""

    method: Literal["auto", "full", "lora", "qlora", "qat"] = "auto"
    seq_len: int | None = None
    """None: 1024, or as many as the model knows positions if that is less."""
    global_batch_size: int | None = None
    """Rows of an optimizer step, in micro-batches that divide it; None: one micro-batch of any size is a step."""
    devices_per_node: int = 1
    nodes: int = 1
    device_name: str = "the device"
    may_offload: bool = False
    """Whether the device has a host with memory of its own."""
    lacks: frozenset[str] = frozenset()
    """Formats that the device does not compute in."""
    settings: tuple[str, ...] = ()
    """`key=value` of any recipe key, as for `Recipe.with_settings`."""

    @property
    def pinned(self) -> frozenset[str]:
        """Keys that the settings decide."""
        return frozenset(setting.partition("=")[0].strip() for setting in self.settings)

    def on(self, device: Device, *, devices_per_node: int, nodes: int) -> "Constraints":
        """With what so many of a device add."""
        return replace(
            self,
            devices_per_node=devices_per_node,
            nodes=nodes,
            device_name=device.name,
            may_offload=device.kind == "cuda",
            lacks=frozenset(device.lacks),
        )


def value_of(recipe: Recipe, key: str) -> Any:
    """What a recipe holds under a dotted key."""
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check(constraints: Constraints) -> None:
    """Raises UsageError for two options that decide one thing, or a number out of range."""
    both = {"method": constraints.method != "auto", "seq_len": constraints.seq_len is not None}
    for key, given in both.items():
        if given and key in constraints.pinned:
            raise UsageError(f"--{key.replace('_', '-')} and --set {key}=... both decide {key}; give one of them")
    if constraints.global_batch_size is not None and constraints.global_batch_size < 1:
        raise UsageError(f"--global-batch-size {constraints.global_batch_size} is out of range; the least is 1")


def check_base(spec: ModelSpec, base: Recipe, constraints: Constraints) -> None:
    """Raises UsageError where what was decided contradicts the model or the device. The error names both."""
    _check_length(spec, base)
    _check_tensor(spec, base.parallel.tensor)
    for key in sorted(key for key in constraints.pinned if key.startswith("precision.")):
        if (value := value_of(base, key)) in constraints.lacks:
            raise UsageError(
                f"{key} = {value} and {constraints.device_name} contradict each other: it does not compute in "
                f"{str(value).upper()}; nearest: --set {key}={'fp32' if 'fp16' in constraints.lacks else 'fp16'}"
            )


def _check_length(spec: ModelSpec, base: Recipe) -> None:
    """A model with relative positions (T5) has none that a longer row would miss."""
    positions = spec.num_positions
    if positions is None or "relative_attention_num_buckets" in spec.config or base.seq_len <= positions:
        return
    raise UsageError(
        f"seq_len = {base.seq_len} and {spec.name} contradict each other: it was made for {positions} positions; "
        f"nearest: --seq-len {positions}"
    )


def _check_tensor(spec: ModelSpec, ranks: int) -> None:
    if can_divide(spec, ranks):
        return
    if spec.model_type not in DIVIDED_FAMILIES:
        raise UsageError(
            f"parallel.tensor = {ranks} and {spec.name} contradict each other: the planner divides matrices of "
            f"{', '.join(sorted(DIVIDED_FAMILIES))}, not of {spec.model_type}; nearest: --tensor 1"
        )
    sizes = {
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "intermediate_size": spec.intermediate_size,
    }
    name, size = next((name, size) for name, size in sizes.items() if size % ranks)
    nearest = next(count for count in range(ranks, 0, -1) if can_divide(spec, count))
    raise UsageError(
        f"parallel.tensor = {ranks} and {name} = {size} of {spec.name} contradict each other: each device takes as "
        f"many; nearest: --tensor {nearest}"
    )
