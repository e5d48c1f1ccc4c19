"""What a recipe runs on: devices, found on this machine and measured."""

from brim.hardware.device import Device, DeviceKind, MatmulFormat

__all__ = ["Device", "DeviceKind", "MatmulFormat"]
