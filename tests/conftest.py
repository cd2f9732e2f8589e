"""What every test shares: no network, one thread, compiled modules, GPU tests that say what they miss."""

import atexit
import copy
import os
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny products gain nothing from a second thread, and lose ten times its worth where another job takes its core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    # Every process that a test starts would compile torch's modules anew, for four seconds and more. They share what the
    # first one compiled, in a folder that ends with the session; beside the sources nothing is written.
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="bytecode-")
    sys.dont_write_bytecode = False
    atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Sequence

# How fast examples are drawn says something of the machine's load only.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

_trees: dict[tuple[str, ...], dict[str, Any]] = {}


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overrides that were composed before in this session are not composed again, which takes a fifth of a second."""
    from wrinklefree import composition
    from wrinklefree.training import study

    compose_tree = composition.compose_tree

    def remember(overrides: "Sequence[str]" = ()) -> dict[str, Any]:
        key = (str(composition.config_directory()), *overrides)
        if key not in _trees:
            _trees[key] = compose_tree(overrides)
        return copy.deepcopy(_trees[key])

    for module in (composition, study):
        monkeypatch.setattr(module, "compose_tree", remember)


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
