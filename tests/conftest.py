"""What every test shares: no network, one thread count, GPU tests that say what they miss."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Sequence

# How fast examples are drawn says something of the machine's load only.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

GPUS_NEEDED = {"gpu": 1, "multi_gpu": 2}


def pytest_report_header(config: pytest.Config) -> str:
    return f"selected by marker: {config.option.markexpr!r}; what is left out runs with -m slow, network or reliability"


def pytest_collection_modifyitems(items: "Sequence[pytest.Item]") -> None:
    marked = [(item, GPUS_NEEDED[name]) for item in items for name in GPUS_NEEDED if item.get_closest_marker(name)]
    if not marked:
        return
    import torch

    present = torch.cuda.device_count()
    for item, needed in marked:
        if present < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), this machine has {present}"))
