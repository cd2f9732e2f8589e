"""What the data group refuses, in one line that says what to set."""

from typing import Any

import pytest

from wrinklefree.data.config import PretrainData
from wrinklefree.utils.config import decode
from wrinklefree.utils.errors import ConfigError


def tree(*weights: float, **others: Any) -> dict[str, Any]:
    sources = [{"kind": "facts", "weight": weight} for weight in weights]
    return {"name": "x", "sources": sources, **others}


@pytest.mark.parametrize("weights", [(1.0,), (0.7, 0.3), (1 / 3, 1 / 3, 1 / 3)])
def test_shares_that_sum_to_one(weights: tuple[float, ...]) -> None:
    assert [source.weight for source in decode(PretrainData, tree(*weights)).sources] == list(weights)


def test_shares_that_do_not_are_refused_unless_they_are_said_to_be_relative() -> None:
    with pytest.raises(
        ConfigError, match=r"weights of the 2 sources sum to 1\.1 \(0\.7 \+ 0\.4\), not 1; correct them"
    ):
        decode(PretrainData, tree(0.7, 0.4))
    assert decode(PretrainData, tree(0.7, 0.4, normalize_weights=True)).normalize_weights


@pytest.mark.parametrize(
    ("others", "line"),
    [
        ({"shuffle_buffer": -1}, "shuffle_buffer: expected a number greater than or equal to 0, given -1"),
        ({"num_workers": -1}, "num_workers: expected a number greater than or equal to 0, given -1"),
        ({"sources": []}, "sources: expected"),
    ],
)
def test_numbers_out_of_range(others: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(PretrainData, tree(1.0) | others)
    assert str(caught.value).startswith(line)
