"""Two processes that all tests of this folder share, and `benchmark`, whose beds they train."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmark.sharded_equality import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """`ranks.run(2, train, bed)` trains a bed on two processes, `ranks.run(1, ...)` on one."""
    processes = Ranks(2)
    yield processes
    processes.close()
