"""The wrapped optimizer: same training, state, schedulers; updates when they are due; each knob's effect."""

import json
import logging
import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from cheapertraining import (
    CheaperTrainingError,
    DataInfCalculator,
    InfluenceAwareOptimizer,
    MixtureWeightCalculator,
    Probe,
)

PRIOR = {"plus_one": 0.5, "noise": 0.5}


@pytest.fixture
def build(tiny_lm, loss, make_language):
    """(model, optimizer, weights handed out); the probe's language is that of the source `plus_one`."""

    def draw(successor, noise, salt):
        return lambda update: [make_language(successor, rows=8, seed=1000 * update + salt, noise=noise)]

    def make(*, calculator=None, mixture=None, base=None, probes=None, sources=None, **options):
        model = tiny_lm()
        handed_out = []
        sources = sources or {"plus_one": draw(1, 0.0, 1), "noise": draw(1, 1.0, 2)}
        optimizer = InfluenceAwareOptimizer(
            (base or (lambda p: torch.optim.AdamW(p, lr=1e-2)))(model.parameters()),
            DataInfCalculator(model, loss, groups=4, **(calculator or {})),
            MixtureWeightCalculator(PRIOR, **(mixture or {})),
            sources=sources,
            probes=probes or {"plus_one": Probe(draw(1, 0.0, 3))},
            on_weights=lambda weights: handed_out.append(dict(weights)),
            **{"update_interval": 2, **options},
        )
        return model, optimizer, handed_out

    return make


@pytest.fixture
def train(loss, make_language):
    def steps(model, optimizer, numbers):
        for number in numbers:
            sums, counts = loss(model, make_language(1, rows=4, seed=number, noise=0.3))
            (sums.sum() / counts.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    return steps


def test_parameters_train_as_with_the_base_optimizer(build, train, tiny_lm):
    model, optimizer, handed_out = build()
    alone = tiny_lm()
    wrapped = train(model, optimizer, range(5))
    plain = train(alone, torch.optim.AdamW(alone.parameters(), lr=1e-2), range(5))
    assert all(torch.equal(a, b) for a, b in zip(wrapped, plain, strict=True))
    assert len(handed_out) == 2
    assert handed_out[-1] == optimizer.weights
    assert optimizer.weights["noise"] < 0.5
    report = optimizer.last_report
    assert report.step == 4
    assert report.scores.rows == 8 * 3
    assert report.mixture.weights == optimizer.weights
    assert report.seconds > 0 and report.overhead > 0


def test_update_interval_only_decides_when(build, train):
    runs = {}
    for interval in (1, 3, 7):
        model, optimizer, handed_out = build(update_interval=interval)
        runs[interval] = train(model, optimizer, range(6)), handed_out
    assert [len(handed_out) for _, handed_out in runs.values()] == [6, 2, 0]
    for parameters, _ in runs.values():
        assert all(torch.equal(a, b) for a, b in zip(parameters, runs[1][0], strict=True))


def test_each_knob_changes_what_it_says_and_nothing_else(build, train):
    """lambda_val: scores; gamma_val: z; temperature: target; learning_rate: weights; each leaves what comes before."""

    def run(**options):
        model, optimizer, _ = build(**options)
        parameters = train(model, optimizer, range(4))
        report = optimizer.last_report
        # Early in training evidence is weak for either knob to show at a limit or a threshold: both are opened.
        update = report.mixture
        return parameters, (report.scores.combined, update.z, update.target, update.weights)

    def mixture(**knobs):
        return {"threshold": 0.0, "evidence_limit": 1e3, **knobs}

    base_parameters, base = run(mixture=mixture())
    first_change = {}
    for knob, options in {
        "lambda_val": {"mixture": mixture(), "calculator": {"lambda_val": 1.0}},
        "gamma_val": {"mixture": mixture(gamma_val=0.9)},
        "temperature": {"mixture": mixture(temperature=5.0)},
        "learning_rate": {"mixture": mixture(learning_rate=0.9)},
    }.items():
        parameters, stages = run(**options)
        assert all(torch.equal(a, b) for a, b in zip(parameters, base_parameters, strict=True))
        same = [ours == theirs for ours, theirs in zip(stages, base, strict=True)]
        first_change[knob] = same.index(False)
        assert not any(same[first_change[knob] :]), knob
    assert first_change == {"lambda_val": 0, "gamma_val": 1, "temperature": 2, "learning_rate": 3}


def test_lambda_has_no_effect_on_the_dot_score(build, train):
    results = []
    for lambda_val in (0.01, 10.0):
        model, optimizer, _ = build(calculator={"score": "dot", "lambda_val": lambda_val})
        train(model, optimizer, range(2))
        results.append(optimizer.last_report.scores.combined)
    assert results[0] == results[1]


def test_resume_is_exact(build, train):
    model, optimizer, _ = build()
    whole = train(model, optimizer, range(9))
    first_model, first, _ = build()
    train(first_model, first, range(5))
    model_state, state = first_model.state_dict(), first.state_dict()
    json.dumps(state["influence"])
    resumed_model, resumed, handed_out = build()
    resumed_model.load_state_dict(model_state)
    resumed.load_state_dict(state)
    assert handed_out == []
    assert resumed.weights == first.weights
    continued = train(resumed_model, resumed, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(whole, continued, strict=True))
    assert resumed.weights == optimizer.weights
    assert resumed.state_dict()["influence"] == optimizer.state_dict()["influence"]


def test_a_base_optimizers_state_loads_with_a_warning(build, train, tiny_lm, caplog):
    alone = tiny_lm()
    base = torch.optim.AdamW(alone.parameters(), lr=3e-3)
    train(alone, base, range(2))
    _, optimizer, _ = build()
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(base.state_dict())
    assert "holds no influence state" in caplog.text
    assert optimizer.param_groups[0]["lr"] == optimizer.base.param_groups[0]["lr"] == 3e-3
    assert optimizer.weights == PRIOR


def test_schedulers_and_groups_reach_the_base(build, train):
    model, optimizer, _ = build()
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, [0])
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(5e-3)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, [1])
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(2.5e-3)
    extra = torch.nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    assert len(optimizer.base.param_groups) == len(optimizer.param_groups) == 2
    assert optimizer.state is optimizer.base.state
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_closure_and_zero_grad(build, loss, make_language):
    model, optimizer, _ = build(base=lambda p: torch.optim.SGD(p, lr=0.1))

    def closure():
        optimizer.zero_grad()
        value = loss(model, make_language(1, rows=4, seed=0))[0].sum()
        value.backward()
        return value

    assert optimizer.step(closure).item() > 0
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_scores_that_are_not_finite_move_nothing(build, caplog):
    model, optimizer, handed_out = build()
    with torch.no_grad():
        model.blocks[0].up.weight.fill_(math.nan)
    with caplog.at_level(logging.WARNING):
        report = optimizer.update_weights()
    assert report.mixture is None
    assert optimizer.weights == PRIOR
    assert handed_out == []
    assert "no finite influence of plus_one, noise; the mixture stays" in caplog.text


def test_refusals(build):
    with pytest.raises(CheaperTrainingError, match="update_interval is 0"):
        build(update_interval=0)
    with pytest.raises(CheaperTrainingError, match="sources other to score, weights for noise, plus_one"):
        build(sources={"other": lambda update: []})
    empty = dict.fromkeys(PRIOR, lambda update: [])
    with pytest.raises(CheaperTrainingError, match="source plus_one drew no batch at update 0"):
        build(sources=empty)[1].update_weights()
