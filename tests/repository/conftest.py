"""Many of these tests ask for the same compositions."""

import pytest


@pytest.fixture(autouse=True)
def remembers_compositions(composed_once: None) -> None: ...
