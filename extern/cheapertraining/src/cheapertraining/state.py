"""What measuring must not change: train/eval flags and random states."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import nn


@contextmanager
def preserved_training_state(model: nn.Module) -> Iterator[None]:
    """Afterwards every module's train/eval flag and every random generator is as it was before.

    Generators: Python, NumPy, PyTorch on the CPU and on the CUDA devices that hold the model.
    """
    flags = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    devices = sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, training in flags:
            module.training = training
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
