"""Each step from scores to weights, each knob, and the exact projection."""

import json
import math
import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cheapertraining import CheaperTrainingError, MixtureWeightCalculator, project_to_bounds

PRIOR = {"good": 0.25, "plain": 0.5, "bad": 0.25}
SCORES = {"good": [3.0, 4.0, 5.0, 4.0], "plain": [0.5, -0.5, 0.25, -0.25], "bad": [-3.0, -4.0, -5.0, -4.0]}


def test_one_update_by_hand():
    mixture = MixtureWeightCalculator(
        PRIOR, gamma_val=0.1, temperature=2.0, learning_rate=0.5, threshold=2, evidence_limit=100
    )
    update = mixture.update(SCORES)
    centre = 0.25 * 4 - 0.25 * 4
    error_good = error_bad = math.sqrt(2 / 3 / 4)
    error_plain = math.sqrt(0.625 / 3 / 4)
    z_good = (4 - centre) / math.sqrt((0.75 * error_good) ** 2 + (0.5 * error_plain) ** 2 + (0.25 * error_bad) ** 2)
    assert update.scores == {"good": 4.0, "plain": 0.0, "bad": -4.0}
    assert update.z["good"] == pytest.approx(z_good)
    assert update.z["plain"] == 0.0
    powers = {"good": 0.25 * math.exp((z_good - 2) / 2), "plain": 0.5, "bad": 0.25 * math.exp(-(z_good - 2) / 2)}
    for name, power in powers.items():
        target = power / sum(powers.values())
        assert update.target[name] == pytest.approx(target)
        assert update.weights[name] == pytest.approx(0.5 * PRIOR[name] + 0.5 * target)
    assert mixture.weights == update.weights


def test_without_evidence_nothing_moves_and_moved_weights_return():
    mixture = MixtureWeightCalculator(PRIOR, gamma_val=1.0)
    mixture.update({name: [1.0, -1.0, 0.5, -0.4] for name in PRIOR})
    assert mixture.weights == PRIOR
    moved = mixture.update(SCORES).weights["bad"]
    assert moved < 0.25
    back = mixture.update({name: [1.0, -1.0] for name in PRIOR}).weights["bad"]
    assert back == pytest.approx(0.8 * moved + 0.2 * 0.25)


def test_scores_without_spread():
    mixture = MixtureWeightCalculator({"a": 0.5, "b": 0.5})
    assert mixture.update({"a": [2.0, 2.0], "b": [2.0, 2.0]}).z == {"a": 0.0, "b": 0.0}
    assert mixture.update({"a": [2.0, 2.0], "b": [1.0, 1.0]}).z == {"a": math.inf, "b": -math.inf}
    assert mixture.weights["a"] > 0.5


def test_temperature_to_infinity_gives_the_prior_and_to_zero_the_best():
    hot, cold = (MixtureWeightCalculator(PRIOR, temperature=t, learning_rate=1.0) for t in (1e12, 1e-3))
    for name, weight in hot.update(SCORES).weights.items():
        assert weight == pytest.approx(PRIOR[name], abs=1e-9)
    assert cold.update(SCORES).weights == pytest.approx({"good": 1.0, "plain": 0.0, "bad": 0.0})


def test_evidence_limit_bounds_how_far_a_target_goes():
    target = MixtureWeightCalculator(PRIOR, evidence_limit=1.5, temperature=0.5).update(SCORES).target
    assert target["good"] / target["bad"] == pytest.approx(math.exp(2 * 1.5 / 0.5))


def test_each_knob_changes_what_it_says_and_nothing_else():
    """After two updates that disagree, by knob: the running average (seen in z), the target, or only the step."""
    second = {"good": [1.0, 2.0, 0.0, 1.0], "plain": [0.1, 0.0, 0.2, -0.1], "bad": [-1.0, -2.0, 0.0, -1.0]}

    def run(**knobs):
        mixture = MixtureWeightCalculator(PRIOR, **{"evidence_limit": 50.0, **knobs})
        mixture.update(SCORES)
        return mixture.update(second)

    base, gamma, temperature, rate = run(), run(gamma_val=0.5), run(temperature=3.0), run(learning_rate=0.7)
    assert all(other.scores == base.scores for other in (gamma, temperature, rate))
    assert gamma.z != base.z
    assert temperature.z == base.z and rate.z == base.z
    assert temperature.target != base.target
    assert rate.target == base.target
    assert len({json.dumps(u.weights) for u in (base, gamma, temperature, rate)}) == 4


def test_gamma_one_forgets_and_a_small_gamma_averages_with_the_right_error():
    """z of the average of equal-sized observations is theirs over the error of a weighted mean."""
    flipped = {name: [-value for value in values] for name, values in SCORES.items()}
    forgetful = MixtureWeightCalculator(PRIOR, gamma_val=1.0)
    once = forgetful.update(SCORES).z
    assert forgetful.update(flipped).z == pytest.approx({name: -value for name, value in once.items()})
    steady = MixtureWeightCalculator(PRIOR, gamma_val=0.1)
    first, second = steady.update(SCORES).z, steady.update(SCORES).z
    assert first == pytest.approx(once), "the correction for the start at zero cancels"
    assert second["good"] == pytest.approx(once["good"] * 1.9 / math.sqrt(1 + 0.81))


def test_identical_sources_keep_the_prior():
    """Four sources with one distribution, 100 updates, 20 repetitions: the weights stay where they were."""
    prior = dict.fromkeys("abcd", 0.25)
    moved = []
    for seed in range(20):
        draw = random.Random(seed)
        mixture = MixtureWeightCalculator(prior)
        for _ in range(100):
            mixture.update({name: [draw.gauss(0.3, 1.0) for _ in range(8)] for name in prior})
            moved.append(max(abs(weight - 0.25) for weight in mixture.weights.values()))
    assert sum(moved) / len(moved) < 0.002
    assert max(moved) < 0.15


def test_the_state_continues_exactly():
    whole, first = MixtureWeightCalculator(PRIOR), MixtureWeightCalculator(PRIOR)
    for mixture in (whole, first):
        mixture.update(SCORES)
    resumed = MixtureWeightCalculator(PRIOR)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    later = {name: [*values[::-1], 0.1] for name, values in SCORES.items()}
    assert resumed.update(later) == whole.update(later)
    assert resumed.updates == 2
    with pytest.raises(CheaperTrainingError, match="saved mixture has sources bad, good, plain, this one has a"):
        MixtureWeightCalculator({"a": 1.0}).load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    ("prior", "knobs", "message"),
    [
        ({}, {}, "no sources"),
        ({"a": 0.5, "b": 0.4}, {}, "the weights of a, b sum to 0.9: they must sum to 1"),
        ({"a": 1.0, "b": 0.0}, {}, "source b has weight 0.0: it must be positive"),
        ({"a": 2.0, "b": -1.0}, {}, "source b has weight -1.0"),
        ({"a": math.nan}, {}, "source a has weight nan"),
        ({"a": 1.0}, {"gamma_val": 0.0}, r"gamma_val is 0.0: it must be in \(0, 1\]"),
        ({"a": 1.0}, {"learning_rate": 1.5}, "learning_rate is 1.5"),
        ({"a": 1.0}, {"temperature": 0.0}, "temperature is 0.0: it must be positive"),
        ({"a": 0.5, "b": 0.5}, {"min_weight": 0.6}, "2 weights between 0.6 and 1.0 cannot sum to 1"),
        ({"a": 0.5, "b": 0.5}, {"max_weight": 0.4}, "2 weights between 0.0 and 0.4 cannot sum to 1"),
    ],
)
def test_refused_settings(prior, knobs, message):
    with pytest.raises(CheaperTrainingError, match=message):
        MixtureWeightCalculator(prior, **knobs)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"good": [1, 2], "bad": [1, 2]}, "scores for bad, good, weights for bad, good, plain"),
        ({"good": [1, 2], "bad": [1, 2], "plain": [1]}, "source plain has 1 group"),
        ({"good": [1, 2], "bad": [1, 2], "plain": [1, math.nan]}, "source plain has a score that is not finite"),
    ],
)
def test_refused_scores_move_nothing(scores, message):
    mixture = MixtureWeightCalculator(PRIOR)
    before = mixture.state_dict()
    with pytest.raises(CheaperTrainingError, match=message):
        mixture.update(scores)
    assert mixture.state_dict() == before


def test_bounds_hold():
    mixture = MixtureWeightCalculator(PRIOR, learning_rate=1.0, min_weight=0.1, max_weight=0.6, temperature=0.01)
    weights = mixture.update(SCORES).weights
    assert weights == pytest.approx({"good": 0.6, "plain": 0.3, "bad": 0.1}, abs=0.2)
    assert min(weights.values()) >= 0.1 and max(weights.values()) <= 0.6
    assert math.fsum(weights.values()) == pytest.approx(1.0, abs=1e-15)


def optimum_by_enumeration(values, low, high):
    """The projection by its optimality conditions: try every assignment of entries to low, high and free."""
    best = None
    for kinds in product("lhf", repeat=len(values)):
        free = [v for v, kind in zip(values, kinds, strict=True) if kind == "f"]
        rest = 1 - kinds.count("l") * low - kinds.count("h") * high
        if not free and abs(rest) > 1e-9:
            continue
        shift = (sum(free) - rest) / len(free) if free else 0.0
        point = [{"l": low, "h": high, "f": v - shift}[kind] for v, kind in zip(values, kinds, strict=True)]
        if all(low - 1e-9 <= x <= high + 1e-9 for x in point):
            distance = sum((x - v) ** 2 for x, v in zip(point, values, strict=True))
            if best is None or distance < best[0]:
                best = (distance, point)
    return best[1]


@given(
    st.lists(st.floats(-2, 2), min_size=2, max_size=5),
    st.floats(0, 0.9),
    st.floats(0.05, 1),
)
def test_projection_is_the_nearest_point(values, low_share, high_share):
    low = low_share / len(values)
    high = 1 / len(values) + high_share * (1 - 1 / len(values))
    point = project_to_bounds(values, low, high)
    assert math.fsum(point) == pytest.approx(1.0, abs=1e-12)
    assert all(low <= x <= high for x in point)
    assert point == pytest.approx(optimum_by_enumeration(values, low, high), abs=1e-7)


def test_projection_leaves_points_inside_alone():
    assert project_to_bounds([0.2, 0.3, 0.5], 0.0, 1.0) == pytest.approx([0.2, 0.3, 0.5], abs=1e-15)
