"""Warm-up values."""

import math

import pytest

from wrinklefree.quantization.schedule import WarmupShape, warmup_value


def test_closed_forms() -> None:
    assert warmup_value(0, start=0.0, steps=10, shape="linear") == 0.0
    assert warmup_value(5, start=0.0, steps=10, shape="linear") == 0.5
    assert warmup_value(5, start=0.4, steps=10, shape="linear") == pytest.approx(0.7)
    assert warmup_value(5, start=0.0, steps=10, shape="cosine") == pytest.approx(0.5)
    assert warmup_value(1, start=0.0, steps=3, shape="cosine") == pytest.approx(0.25)
    assert warmup_value(5, start=0.0, steps=10, shape="sigmoid") == pytest.approx(0.5)
    # The logistic function at -3 (a quarter of the way from -6 to 6), stretched to start at 0 and end at 1.
    low, quarter = 1 / (1 + math.exp(6)), 1 / (1 + math.exp(3))
    assert warmup_value(1, start=0.0, steps=4, shape="sigmoid") == pytest.approx((quarter - low) / (1 - 2 * low))
    assert warmup_value(0, start=0.0, steps=10, shape="none") == 1.0


@pytest.mark.parametrize("shape", ["linear", "cosine", "sigmoid"])
def test_rises_from_start_and_ends_at_exactly_one(shape: WarmupShape) -> None:
    values = [warmup_value(step, start=0.2, steps=7, shape=shape) for step in range(12)]
    assert values[0] == pytest.approx(0.2)
    assert values == sorted(values)
    assert values[6] < 1.0
    assert all(value == 1.0 for value in values[7:])


def test_no_steps_is_one_at_once() -> None:
    assert warmup_value(0, start=0.0, steps=0, shape="linear") == 1.0
