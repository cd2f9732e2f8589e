"""Seeds, and the settings under which two CPU runs agree in every bit.

On a GPU the same holds for one device model, world size and attention backend only.
"""

import os
import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices). Data order has seeded generators of its own."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]


@contextmanager
def deterministic(threads: int | None) -> Generator[None]:
    """Run with deterministic kernels and `threads` CPU threads; None keeps their number.

    The number matters: it decides in which order partial sums are added. All settings are put back on leaving.
    """
    threads_before = torch.get_num_threads()
    algorithms_before = torch.are_deterministic_algorithms_enabled()
    warn_only_before = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill_before = settings.fill_uninitialized_memory
    benchmark_before = torch.backends.cudnn.benchmark
    # cuBLAS reads this when its first handle is created, and refuses deterministic mode without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory with NaN finds defects but costs time, and has no part in determinism.
    settings.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        torch.use_deterministic_algorithms(algorithms_before, warn_only=warn_only_before)
        settings.fill_uninitialized_memory = fill_before
        torch.backends.cudnn.benchmark = benchmark_before
