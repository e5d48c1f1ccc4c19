"""What the libraries below say to a terminal, kept from the user: he asked Brim, and Brim says it in its own words."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_torch() -> None:
    """torch's C++ notes are off from its first import on, so this comes before any.

    The note meant: PyTorch 2.13's profiler tells of memory that was allocated before it started
    (c10/core/CPUAllocator.cpp), once a process; delete this when it no longer does.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """transformers' log and progress bars are off in the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
