"""Shares of tokens follow the weights, also when these change."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrinklefree.data.mixture import Mixture
from wrinklefree.utils.errors import ConfigError

LONGEST = 50
weights_of_three = st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3)


def serve(mixture: Mixture, lengths: list[int]) -> list[int]:
    chosen = []
    for length in lengths:
        chosen.append(mixture.next_source())
        mixture.count(chosen[-1], length)
    return chosen


@given(weights_of_three, st.lists(st.integers(1, LONGEST), min_size=1, max_size=200))
def test_no_source_is_ever_further_from_its_share_than_a_few_pieces(weights: list[float], lengths: list[int]) -> None:
    mixture = Mixture(weights)
    for length in lengths:
        serve(mixture, [length])
        total = sum(mixture.served)
        for served, weight in zip(mixture.served, weights, strict=True):
            assert abs(served - total * weight / sum(weights)) <= LONGEST * 3


@given(weights_of_three, weights_of_three)
def test_new_weights_hold_from_now_on_and_make_up_for_nothing(old: list[float], new: list[float]) -> None:
    mixture = Mixture(old)
    serve(mixture, [7, 31, 2, 50] * 100)
    before = mixture.served
    mixture.set_weights(new)
    serve(mixture, [11, 3, 50] * 200)
    since = [now - then for now, then in zip(mixture.served, before, strict=True)]
    for served, weight in zip(since, new, strict=True):
        assert abs(served - sum(since) * weight / sum(new)) <= LONGEST * 6


def test_a_source_of_weight_zero_is_never_drawn() -> None:
    mixture = Mixture([0.5, 0.5])
    serve(mixture, [10] * 11)
    mixture.set_weights([0.0, 1.0])
    assert set(serve(mixture, [10] * 50)) == {1}
    mixture.set_weights([0.5, 0.5])
    assert abs(serve(mixture, [10] * 100).count(0) - 50) <= 1


def test_setting_the_same_weights_changes_nothing() -> None:
    left, right = Mixture([0.5, 0.25, 0.25]), Mixture([0.5, 0.25, 0.25])
    for _ in range(20):
        right.set_weights(right.weights)
        assert serve(left, [3, 8]) == serve(right, [3, 8])


def test_a_mixture_continues_from_its_state() -> None:
    first, second = Mixture([0.7, 0.3]), Mixture([0.5, 0.5])
    serve(first, [5, 9] * 10)
    first.set_weights([0.1, 0.9])
    serve(first, [5, 9] * 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert serve(first, [4] * 50) == serve(second, [4] * 50)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ([1.0], "1 weights for 2 sources"),
        ([0.0, 0.0], "all of them are 0"),
        ([0.5, -0.5], "-0.5 is negative or not finite"),
        ([0.5, float("nan")], "nan is negative or not finite"),
    ],
)
def test_weights_that_mean_nothing(weights: list[float], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Mixture([0.5, 0.5]).set_weights(weights)
