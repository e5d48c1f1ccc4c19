"""What torch itself says to a terminal, kept from the user (of transformers: brim.models.quiet)."""

import logging
import os


def quiet_torch() -> None:
    """torch's C++ notes are off from its first import on, so this comes before any.

    The note meant: PyTorch 2.13's profiler tells of memory that was allocated before it started
    (c10/core/CPUAllocator.cpp), once a process; delete this when it no longer does.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # bitsandbytes 0.50.2 warns at import, on CPUs with AVX512-BF16, of a kernel for inference that Brim does not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # torchao 0.18, which PEFT imports, warns of kernels for GPUs and of what torch 2.13 deprecates.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
