"""What a study says of known records: means, closure, verdicts, missing arms, and the document between its markers."""

from pathlib import Path
from typing import Any

import pytest

from wrinklefree.training.study_config import StudyCommand, StudyConfig
from wrinklefree.training.study_report import (
    by_arm,
    check_claims,
    insert_section,
    reached_at,
    render_section,
    summarize_arms,
    write_study_report,
)
from wrinklefree.training.study_results import ArmResult, Measure, RateTrial, write_result, write_trials
from wrinklefree.utils.config import decode
from wrinklefree.utils.errors import ConfigError, DataError

ITEMS = 40


def study(**changes: Any) -> StudyConfig:
    arms = {
        "full precision": {"step": "root", "meaning": "start"},
        "control": {"step": "root", "meaning": "more of it"},
        "none": {"step": "root", "meaning": "baseline", "control": "control"},
        "S3": {"step": "root", "meaning": "student", "control": "control"},
    }
    return decode(
        StudyConfig,
        {
            "name": "known",
            "question": "q",
            "seeds": [0, 1],
            "steps": {"root": {"command": ["experiment=study_base"]}},
            "arms": arms,
            "baseline": "none",
            "comparisons": [
                {"claim": "distillation helps", "better": "S3", "than": "none"},
                {"claim": "rounding helps", "better": "none", "than": "control"},
            ],
            "scoring": {"text": ["data=packaged"]},
            **changes,
        },
    )


def bits(arm: str, seed: int, value: float) -> ArmResult:
    """Every document has 10 bytes and `value` bits each."""
    measure = Measure(
        metric="bits_per_byte", lower_is_better=True, value=value, low=value, high=value,
        items=(value * 10,) * ITEMS, weights=(10.0,) * ITEMS,
    )  # fmt: skip
    return ArmResult(
        study="known", arm=arm, seed=seed, status="completed", commit="c0ffee", tokens=100, measures=(measure,)
    )


def known(shift: float = 0.001) -> list[ArmResult]:
    values = {"full precision": 1.5, "control": 1.4, "none": 2.0, "S3": 1.55}
    return [bits(arm, seed, value + seed * shift) for arm, value in values.items() for seed in (0, 1)]


def test_closure_is_counted_from_baseline_to_control() -> None:
    rows = {row.arm: row for row in summarize_arms(study(), by_arm(known(), "bits_per_byte"))}
    closure = rows["S3"].closure
    assert closure is not None
    assert closure.value == pytest.approx(0.45 / 0.6)
    assert rows["none"].closure is None
    assert rows["control"].closure is None
    assert rows["S3"].value == pytest.approx(1.5505)


def test_accuracy_closes_a_gap_of_errors() -> None:
    def hits(arm: str, right: int) -> ArmResult:
        items = (1.0,) * right + (0.0,) * (100 - right)
        measure = Measure(
            metric="recall accuracy", lower_is_better=False, value=right / 100, low=0, high=1,
            items=items, weights=(1.0,) * 100,
        )  # fmt: skip
        return ArmResult(study="known", arm=arm, seed=0, status="completed", measures=(measure,))

    results = [hits("control", 90), hits("none", 40), hits("S3", 80)]
    rows = {row.arm: row for row in summarize_arms(study(), by_arm(results, "recall accuracy"))}
    closure = rows["S3"].closure
    assert closure is not None
    assert closure.value == pytest.approx(0.8)
    near = [hits("control", 44), hits("none", 40), hits("S3", 42)]
    closure = {row.arm: row for row in summarize_arms(study(), by_arm(near, "recall accuracy"))}["S3"].closure
    assert closure is not None
    assert closure.value is None
    assert closure.reason == "undefined: the gap is 0.0400, below 0.05"


def test_claims_are_paired_by_seed() -> None:
    """Seeds that differ by 5 bits leave a difference of 0.45 in both of them."""
    verdicts = {claim.claim: claim for claim in check_claims(study(), known(shift=5.0))}
    helps = verdicts["distillation helps"]
    assert helps.value == pytest.approx(0.45)
    assert helps.interval.low == pytest.approx(0.45)
    assert helps.verdict == "holds"
    assert verdicts["rounding helps"].verdict == "reversed"


@pytest.mark.parametrize(("target", "x"), [(0.5, 10.0), (0.75, 10**1.5), (0.95, None), (0.1, 1.0)])
def test_where_a_curve_reaches_a_target(target: float, x: float | None) -> None:
    points = [(100.0, 0.8), (1.0, 0.2), (10.0, 0.5)]
    found = reached_at(points, target if target != 0.75 else 0.65)
    assert found == (None if x is None else pytest.approx(x))


def test_the_section_names_what_failed_and_what_was_not_run() -> None:
    results = [*(r for r in known() if (r.arm, r.seed) not in {("S3", 1), ("none", 1)})]
    results.append(ArmResult(study="known", arm="S3", seed=1, status="failed", error="NonFiniteError: nan"))
    trials = [
        RateTrial(
            study="known", step="root", seed=0, rate=rate, metric="bits_per_byte", value=value, chosen=rate == 1e-3
        )
        for rate, value in ((1e-4, 2.0), (1e-3, 1.5))
    ]
    text = render_section(study(), results, trials, ["a.png"])
    assert "failed: NonFiniteError: nan" in text
    assert "| none | 1    | not run" in text
    assert "0.0001: 2.0000; **0.001: 1.5000**" in text
    assert "The best rate lies at the end of its grid for: root." in text
    assert "commit c0ffee" in text


def test_the_report_writes_section_and_plot_and_replaces_what_stands_between_markers(tmp_path: Path) -> None:
    command = StudyCommand(study="known", output_dir=str(tmp_path))
    with pytest.raises(DataError, match="has no results of study known"):
        write_study_report(command, study())
    for result in known():
        write_result(command.folder, result)
    write_trials(command.folder, [])
    document = tmp_path / "experiments.md"
    document.write_text("# Before\n<!-- study known: begin -->\noutdated line\n<!-- study known: end -->\nafter\n")
    write_study_report(command.model_copy(update={"document": str(document)}), study())
    text = document.read_text()
    assert text.startswith("# Before\n<!-- study known: begin -->\n\n- **Question**: q")
    assert text.endswith("<!-- study known: end -->\nafter\n")
    assert "outdated line" not in text
    assert "![known_bits_per_byte](images/known_bits_per_byte.png)" in text
    assert (tmp_path / "images" / "known_bits_per_byte.png").is_file()
    assert (command.folder / "known_bits_per_byte.png").read_bytes().startswith(b"\x89PNG")


def test_a_document_without_markers_is_refused(tmp_path: Path) -> None:
    document = tmp_path / "experiments.md"
    document.write_text("nothing")
    with pytest.raises(ConfigError, match="has no lines <!-- study known: begin -->"):
        insert_section(document, "known", "text")
    assert document.read_text() == "nothing"
