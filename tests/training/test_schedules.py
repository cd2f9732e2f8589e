"""Schedules against closed forms, at the ends of the run above all."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrinklefree.training.config import ScheduleConfig
from wrinklefree.training.schedules import learning_rate, warmup_steps, weight_decay
from wrinklefree.utils.errors import ConfigError


def rates(total: int, peak: float = 1.0, **settings) -> list[float]:
    return [learning_rate(step, total, ScheduleConfig(**settings), peak) for step in range(total)]


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "two_stage"])
@pytest.mark.parametrize("min_ratio", [0.0, 0.1])
@pytest.mark.parametrize("total", [2, 3, 7, 100])
def test_every_shape_ends_with_the_run_at_its_final_rate(shape, min_ratio, total):
    values = rates(total, 2e-3, type=shape, min_ratio=min_ratio, warmup_share=0.3)
    assert values[-1] == 2e-3 * min_ratio
    assert max(values) == 2e-3
    assert values[-2] > values[-1]


def test_warmup_is_linear_and_its_last_step_is_at_the_peak():
    assert rates(10, 1.0, type="constant", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_share_of_the_run_becomes_steps_and_explicit_steps_override_it():
    assert warmup_steps(200, ScheduleConfig(warmup_share=0.05)) == 10
    assert warmup_steps(200, ScheduleConfig(warmup_share=0.05, warmup_steps=0)) == 0
    assert warmup_steps(3, ScheduleConfig(warmup_share=0.99)) == 2


def test_cosine_after_warmup_is_half_way_down_in_the_middle():
    values = rates(13, 1.0, type="cosine", warmup_steps=3, min_ratio=0.2)
    expected = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(11)]
    assert values[2:] == pytest.approx(expected)
    assert values[7] == pytest.approx(0.6)


def test_linear_falls_by_equal_amounts():
    assert rates(5, 4.0, type="linear", warmup_share=0) == pytest.approx([4, 3, 2, 1, 0])


def test_wsd_stays_at_the_peak_and_decays_over_its_share():
    values = rates(20, 1.0, type="wsd", warmup_share=0, decay_share=0.25)
    assert values[:15] == [1.0] * 15
    assert values[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_wsd_with_a_decay_longer_than_what_the_warmup_left_still_reaches_the_peak_and_the_end():
    values = rates(10, 1.0, type="wsd", warmup_steps=6, decay_share=1.0)
    assert values[5] == 1.0
    assert values[-1] == 0.0


def test_two_stage_drops_the_rate_to_two_thirds_and_the_decay_to_zero_at_half_way():
    config = ScheduleConfig(type="two_stage", warmup_share=0)
    values = rates(11, 10.0, type="two_stage", warmup_share=0)
    linear = [10.0 - k for k in range(11)]
    assert values[:6] == pytest.approx(linear[:6])
    assert values[6:] == pytest.approx([2 / 3 * rate for rate in linear[6:]])
    assert [weight_decay(step, 4, config, 0.1) for step in range(4)] == [0.1, 0.1, 0.0, 0.0]


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_other_shapes_keep_the_weight_decay(shape):
    assert [weight_decay(step, 4, ScheduleConfig(type=shape), 0.1) for step in range(4)] == [0.1] * 4


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "two_stage", "constant"])
def test_a_run_of_one_step_trains_at_the_peak(shape):
    assert rates(1, 3e-4, type=shape) == [3e-4]


def test_warmup_longer_than_the_run_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"warmup_steps is 50, but the run has only 20 steps"):
        learning_rate(0, 20, ScheduleConfig(warmup_steps=50), 1.0)


@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_outside_the_run_is_a_defect(step):
    with pytest.raises(ValueError, match=f"step {step} is outside a run of 5 steps"):
        learning_rate(step, 5, ScheduleConfig(), 1.0)


@given(
    shape=st.sampled_from(["cosine", "linear", "wsd", "two_stage", "constant"]),
    total=st.integers(1, 300),
    share=st.floats(0, 0.99),
    min_ratio=st.floats(0, 1),
    decay_share=st.floats(0.01, 1),
)
def test_rates_rise_once_then_never_rise_again_and_stay_between_their_ends(shape, total, share, min_ratio, decay_share):
    settings = {"type": shape, "warmup_share": share, "min_ratio": min_ratio, "decay_share": decay_share}
    values = rates(total, 1.0, **settings)
    top = max(warmup_steps(total, ScheduleConfig(**settings)) - 1, 0)
    assert all(a < b for a, b in pairwise(values[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(values[top:]))
    assert values[top] == 1.0
    assert all(min_ratio - 1e-12 <= value <= 1 for value in values[top:])
