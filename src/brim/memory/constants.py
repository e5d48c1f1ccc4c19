"""What a CUDA process takes beside tensors: measured or read from source, one row a fact. No torch.

A constant stands here only with a place where somebody measured it or a program says it; none is fitted to a peak.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from brim.hardware import Device
from brim.units import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    nbytes: int
    what: str
    source: str


CONTEXT = Constant(
    nbytes=481 * MIB,
    what="CUDA context and loaded kernels, lazy loading (CUDA 11.7 and newer): 0.47 GiB on an A100, torch 2.1",
    source="stas00/ml-engineering@744d01e, as in hardware/data/accelerators.csv; 426 MiB on an RTX 6000 Ada with "
    "torch 2.10+cu130 (unsloth-zoo#1053), 300 to 400 MB said in pytorch#107667",
)
CUBLAS_WORKSPACE = Constant(
    nbytes=4096 * 1024 * 2 + 16 * 1024 * 8,
    what="workspace of a cuBLAS handle (`:4096:2:16:8` KiB), compute capability below 9; from the caching allocator",
    source="pytorch aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize",
)
CUBLAS_WORKSPACE_HOPPER = Constant(
    nbytes=32 * MIB,
    what="the same from compute capability 9 on, and on ROCm",
    source="pytorch aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize",
)
NCCL_PAIR = Constant(
    nbytes=544 * MIB,
    what="buffers of an NCCL communicator between two GPUs, once it has reduced: for each of its channels and peers; "
    "not from the caching allocator",
    source="NVIDIA/nccl#964, measured on A100s with NVLink, PyTorch, August 2023",
)
NCCL_GROUP = Constant(
    nbytes=688 * MIB,
    what="the same between more than two, however many: a rank has the same neighbours in a ring or a tree of any size",
    source="NVIDIA/nccl#964; that it grows no more with their number is said in NVIDIA/nccl#986",
)


def nccl_bytes(groups: Iterable[int]) -> int:
    """Buffers of a communicator for each of these groups of GPUs."""
    return sum((NCCL_PAIR if size == 2 else NCCL_GROUP).nbytes for size in groups if size > 1)


def context_bytes(device: Device) -> int:
    """CUDA context of a device: its own figure where it was measured, else an A100's. 0 for a processor."""
    if device.kind == "cpu":
        return 0
    return CONTEXT.nbytes if device.context_bytes is None else device.context_bytes


def cublas_workspace_bytes(device: Device) -> int:
    """Of one handle. Handles belong to threads: forward's has one, the autograd engine's another."""
    if device.kind == "cpu":
        return 0
    older = device.compute_major is not None and device.compute_major < 9
    return (CUBLAS_WORKSPACE if older else CUBLAS_WORKSPACE_HOPPER).nbytes
