"""Figures of made-up trials whose truth is known: effects, noise, confirmation, Pareto front, report and plots."""

import json
import math
import random
from pathlib import Path

import pytest

from benchmark.analysis.figures import (
    LOSS,
    OBJECTIVE,
    best_record,
    by_optimizer,
    compare_best,
    default_noise,
    effects,
    pareto_front,
)
from benchmark.analysis.report import analyse, summary, write_analysis
from benchmark.config.settings import Settings, read_settings
from benchmark.core.metrics import BenchmarkMetrics, Failure, TrialKind, TrialRecord


def metrics(efficiency: float, loss: float = 3.0, peak: int = 2_000_000_000) -> BenchmarkMetrics:
    return BenchmarkMetrics(
        efficiency * peak / 1e9, peak, loss, 10, 1000, 1.0, "CPU, 1 thread(s)", "process", "validation"
    )


def record(
    index: int, efficiency: float | None, loss: float = 3.0, kind: TrialKind = "search", **parameters: object
) -> TrialRecord:
    found = None if efficiency is None else metrics(efficiency, loss)
    failure = Failure("out_of_memory", "a | bar") if found is None else None
    return TrialRecord(kind, index, dict(parameters), 1, "Sobol", 1.0, found, failure)


@pytest.fixture(scope="module")
def settings() -> Settings:
    return read_settings(["benchmark.optimizers=[muon,adamw]"])


@pytest.fixture(scope="module")
def trials(settings: Settings) -> list[TrialRecord]:
    """Accumulation doubles the efficiency from 1 to 8, adamw is 1.5 times muon, the rate moves the loss only; 1% noise."""
    generator = random.Random(0)
    made = [record(i, 100 * generator.uniform(0.99, 1.01), kind="default") for i in range(5)]
    for index in range(40):
        accumulation = generator.choice([1, 2, 4, 8])
        optimizer = generator.choice(["muon", "adamw"])
        rate = math.exp(generator.uniform(math.log(1e-4), math.log(1e-2)))
        efficiency = 100 * 2 ** (math.log2(accumulation) / 3) * (1.5 if optimizer == "adamw" else 1)
        loss = 3 * (1 - 0.3 * (math.log(rate / 1e-4) / math.log(100)))
        made.append(
            record(
                index,
                efficiency * generator.uniform(0.99, 1.01),
                loss * generator.uniform(0.999, 1.001),
                learning_rate=rate,
                gradient_accumulation_steps=accumulation,
                weight_decay=generator.uniform(0.01, 0.2),
                warmup_steps=generator.randint(500, 2000),
                influence_enabled=False,
                optimizer_type=optimizer,
            )
        )
    made.append(record(40, None, learning_rate=1e-3, optimizer_type="muon"))
    return made


def test_effects_are_recovered_and_the_others_are_noise(trials: list[TrialRecord], settings: Settings) -> None:
    found = {effect.knob: effect for effect in effects(trials, settings, OBJECTIVE)}
    assert found["gradient_accumulation_steps"].change == pytest.approx(1.0, abs=0.03)
    assert (found["gradient_accumulation_steps"].from_value, found["gradient_accumulation_steps"].to_value) == (1, 8)
    assert found["optimizer_type"].change == pytest.approx(0.5, abs=0.03)
    assert {knob for knob, effect in found.items() if effect.beyond_noise} == {
        "gradient_accumulation_steps",
        "optimizer_type",
    }
    # Never on: it cannot be judged.
    assert "influence_enabled" not in found
    on_loss = {effect.knob: effect for effect in effects(trials, settings, LOSS)}
    assert on_loss["learning_rate"].change == pytest.approx(-0.3, abs=0.05)
    assert not on_loss["optimizer_type"].beyond_noise


def test_few_trials_say_nothing(trials: list[TrialRecord], settings: Settings) -> None:
    assert effects(trials[:9], settings, OBJECTIVE) == []


def test_noise_is_the_defaults_own_spread(trials: list[TrialRecord]) -> None:
    noise = default_noise(trials)[OBJECTIVE]
    assert noise.count == 5
    assert noise.mean == pytest.approx(100, rel=0.01)
    assert 0 < noise.share < 0.01


def test_best_and_front() -> None:
    made = [
        record(0, 10, 3.0),
        record(1, 12, 2.0),
        record(2, 12, 2.5),
        record(3, 8, 1.0),
        record(4, 7, 1.5),
        record(5, None),
    ]
    best = best_record(made)
    assert best is not None
    assert best.index == 1
    assert [r.index for r in pareto_front(made)] == [1, 3]  # fmt: skip
    assert best_record([record(5, None)]) is None


def test_confirmation_is_a_mean_of_ratios() -> None:
    made = [record(i, value, kind="confirm") for i, value in enumerate([120, 100, 132, 110, 108, 90, 60, 50])]
    found = compare_best(made, lambda m: m.efficiency)
    assert found is not None
    assert (found.pairs, round(found.ratio, 9), round(found.low, 9)) == (4, 1.2, 1.2)
    assert compare_best(made[:1], lambda m: m.efficiency) is None
    # A pair of which one failed does not count.
    assert compare_best([*made, record(8, None, kind="confirm"), record(9, 1, kind="confirm")], lambda m: m.loss).pairs == 4  # type: ignore[union-attr]  # fmt: skip


def test_optimizers_are_told_apart(trials: list[TrialRecord], settings: Settings) -> None:
    groups = by_optimizer(trials, settings)
    assert set(groups) == {"muon", "adamw"}
    assert sum(len(found) for found in groups.values()) == 40


def test_everything_is_written(trials: list[TrialRecord], settings: Settings, tmp_path: Path) -> None:
    confirmed = [record(i, value, kind="confirm") for i, value in enumerate([300, 100, 303, 101])]
    shown = write_analysis(tmp_path, [*trials, *confirmed], settings)
    assert "=== Best Configuration ===" in shown
    assert "=== Optimizer Comparison ===" in shown
    tree = json.loads((tmp_path / "analysis.json").read_text())
    assert tree["best_over_default"][OBJECTIVE]["ratio"] == pytest.approx(3.0)
    assert tree["failed"] == [{"kind": "search", "index": 40, "reason": "a | bar", "failure": "out_of_memory"}]
    report = (tmp_path / "report.md").read_text()
    assert "**tokens/s per GB** is moved by: gradient_accumulation_steps, optimizer_type." in report
    assert "**loss** is moved by: learning_rate." in report
    assert "| search 40 | out_of_memory | a / bar |" in report
    for name in ("optimization_trace", "optimizer_comparison", "parameter_importance"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"plots/{name}.png" in report


def test_nothing_but_failures_is_said_so(settings: Settings, tmp_path: Path) -> None:
    assert write_analysis(tmp_path, [record(0, None)], settings) == "no trial was completed"
    assert "No trial was completed." in (tmp_path / "report.md").read_text()
    assert summary([], settings) == "no trial was completed"
    assert analyse([], settings)["best"] is None
