"""Hardware that a plan may use: so many of a device, the memory of each, and what an hour of all costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from brim.hardware.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Equal devices in equal nodes."""

    device: Device
    budget_bytes: int
    """Memory of each device that the run may use."""
    devices_per_node: int = 1
    nodes: int = 1
    price_usd_per_hour: float | None = None
    """Of one device; None: not known."""
    power_w: float | None = None
    cost_per_s: float = 1.0
    """Of all devices, in the unit that `costed` chose for all offers."""

    @property
    def devices(self) -> int:
        return self.devices_per_node * self.nodes

    @property
    def name(self) -> str:
        """`4 x H100`, `2 nodes of 8 x H100`."""
        many = f"{self.devices_per_node} x {self.device.name}" if self.devices > 1 else self.device.name
        return f"{self.nodes} nodes of {many}" if self.nodes > 1 else many


def costed(offers: Sequence[Offer]) -> tuple[list[Offer], str]:
    """The offers with a cost that compares them, and its name: price where all have one, else energy, else time."""
    prices = [offer.price_usd_per_hour for offer in offers]
    powers = [offer.power_w for offer in offers]
    name, rates = "hours of a device", [1.0] * len(offers)
    if all(prices):
        name, rates = "price", [price / 3600 for price in prices if price]
    elif all(powers):
        name, rates = "energy", [power for power in powers if power]
    return [replace(offer, cost_per_s=offer.devices * rate) for offer, rate in zip(offers, rates, strict=True)], name


def fewer(offer: Offer) -> list[Offer]:
    """The offer, and less of it: half as many nodes at a time, and of the last one half as many devices."""
    counts = [(nodes, offer.devices_per_node) for nodes in _halves(offer.nodes)]
    counts += [(1, devices) for devices in _halves(offer.devices_per_node)[1:]]
    return [replace(offer, nodes=nodes, devices_per_node=devices) for nodes, devices in counts]


def _halves(count: int) -> list[int]:
    """8: 8, 4, 2, 1; 6: 6, 3, 1."""
    found = [count]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found
