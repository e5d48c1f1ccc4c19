"""What a recipe runs on: devices, found by name, or on this machine and measured."""

from brim.hardware.catalogue import Accelerator, accelerators, find
from brim.hardware.device import Device, DeviceKind, MatmulFormat

__all__ = ["Accelerator", "Device", "DeviceKind", "MatmulFormat", "accelerators", "find"]
