"""A study from its first run to its report: shared steps, rates chosen on validation data, failures that stop nobody."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from wrinklefree.training.study import run_study
from wrinklefree.training.study_config import StudyCommand, StudyConfig
from wrinklefree.training.study_results import read_results, read_trials
from wrinklefree.utils.config import decode
from wrinklefree.utils.errors import ConfigError

SHORT = [
    "training.batch_size=4", "training.max_seq_length=64", "training.gradient_accumulation_steps=1",
    "training.evaluation.max_tokens=300",
]  # fmt: skip


@pytest.fixture
def tree(overrides: list[str], text: list[str]) -> dict[str, Any]:
    """Two arms and a control on a model that the study pretrains; every step takes one or two updates."""
    common = [o for o in overrides if not o.startswith(("model.source", "model.path", "output_dir"))]
    data = [*text, *SHORT]
    student = ["training=stage3_distill", *data, "training.epochs=null", "training.max_steps=2"]
    student += ["distillation.attention.relation_heads=4"]
    return {
        "name": "micro",
        "question": "does the runner run?",
        "common": [*common, "audit.enabled=false"],
        "seeds": [0, 1],
        "steps": {
            "root": {
                "command": ["training=fp_pretrain", "training.from_scratch=true", *data, "training.total_tokens=1024"]
            },
            "more": {
                "command": ["training=fp_pretrain", *data, "training.total_tokens=512"],
                "source": "root",
                "rates": [1e-3, 1e-4],
            },
            "stage1": {"command": ["training=stage1_subln", *text, *SHORT[:2]], "source": "root"},
            "s3": {"command": student, "source": "stage1", "teacher": "more", "rates": [1e30, 1e-3]},
            "ce": {
                "command": [*student, "distillation.lambda_logits=0.0", "distillation.gamma_attention=0.0"],
                "source": "stage1",
                "teacher": "more",
                "rate_of": "s3",
            },
        },
        "arms": {
            "control": {"step": "more", "meaning": "full precision"},
            "CE": {"step": "ce", "control": "control", "meaning": "cross-entropy"},
            "S3": {"step": "s3", "control": "control", "meaning": "distilled", "first_seeds": 1},
        },
        "baseline": "CE",
        "scoring": {"text": text, "max_tokens": 300, "max_seq_length": 64},
    }


def command(tmp_path: Path, **changes: Any) -> StudyCommand:
    return StudyCommand(study="micro", output_dir=str(tmp_path / "outputs"), **changes)


def test_a_study_runs_records_goes_on_and_reports(
    tree: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    # Three updates at 1e30 are not finite; that rate fails, and the other one is taken.
    tree["steps"]["s3"]["command"] = [
        *tree["steps"]["s3"]["command"], "training.max_nonfinite_steps=1", "optimizer.type=adamw",
    ]  # fmt: skip
    study = decode(StudyConfig, tree)
    run_study(command(tmp_path), study)
    folder = command(tmp_path).folder

    results = {(r.arm, r.seed): r for r in read_results(folder)}
    assert set(results) == {("control", 0), ("control", 1), ("CE", 0), ("CE", 1), ("S3", 0)}
    assert all(r.status == "completed" for r in results.values())
    assert {r.tokens for r in results.values()} == {512}
    assert {r.steps for r in results.values()} == {2}
    assert results["CE", 0].fingerprint != results["CE", 1].fingerprint
    s3 = results["S3", 0].measure("bits_per_byte")
    assert s3 is not None
    assert sum(s3.items) / sum(s3.weights) == pytest.approx(s3.value)

    trials = {(t.step, t.rate): t for t in read_trials(folder)}
    assert [key for key, t in trials.items() if t.chosen and key[0] == "s3"] == [("s3", 1e-3)]
    assert results["CE", 1].rates["ce"] == 1e-3, "rate_of takes what s3 chose"

    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert {(row["arm"], row["seed"], row["metric"]) for row in rows} >= {("S3", "0", "bits_per_byte")}
    assert json.loads((folder / "study.json").read_text())["seeds"] == [0, 1]
    assert (folder / "section.md").read_text().startswith("- **Question**: does the runner run?")

    # The root of both seeds was trained once, and the second start trains nothing but what failed.
    caplog.clear()
    run_study(command(tmp_path), study)
    assert "already complete" in caplog.text
    assert "fp_pretrain step 1/" not in caplog.text
    again = {(r.arm, r.seed): r for r in read_results(folder)}
    assert again == results


def test_a_step_that_fails_is_recorded_and_the_others_go_on(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["seeds"] = [0]
    tree["steps"]["s3"]["command"] = [*tree["steps"]["s3"]["command"], "distillation.attention.relation_heads=7"]
    study = decode(StudyConfig, tree)
    assert run_study(command(tmp_path), study) == 1
    results = {r.arm: r for r in read_results(command(tmp_path).folder)}
    assert results["S3"].status == "failed"
    assert "relation_heads=7 does not divide" in results["S3"].error
    assert results["CE"].status == "failed"
    assert results["CE"].error.startswith("needs s3, which failed: every rate of s3 failed")
    assert results["control"].status == "completed"
    assert "relation_heads=7" in (command(tmp_path).folder / "section.md").read_text()


def test_one_arm_runs_by_itself_and_the_others_are_listed_as_not_run(tree: dict[str, Any], tmp_path: Path) -> None:
    study = decode(StudyConfig, tree | {"seeds": [0]})
    assert run_study(command(tmp_path, arms=("control",)), study) == 0
    assert [r.arm for r in read_results(command(tmp_path).folder)] == ["control"]
    assert "| S3  | 0    | not run |" in (command(tmp_path).folder / "section.md").read_text()


def test_an_arm_that_trains_nothing_is_scored(
    tree: dict[str, Any], overrides: list[str], text: list[str], tmp_path: Path
) -> None:
    steps = {"start": {"command": ["training=stage1_subln", *text, *SHORT[:2]], "source": "base"}}
    common = [*(o for o in overrides if not o.startswith("output_dir")), "audit.enabled=false"]
    arms = {"start": {"step": "start", "meaning": "rounded"}}
    study = tree | {"steps": steps, "common": common, "arms": arms, "baseline": "start", "seeds": [0]}
    assert run_study(command(tmp_path), decode(StudyConfig, study)) == 0
    (result,) = read_results(command(tmp_path).folder)
    assert (result.status, result.tokens, result.steps) == ("completed", 0, 0)
    assert result.measures[0].value > 0


def test_a_control_of_another_length_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["steps"]["more"]["command"][-1] = "training.total_tokens=1024"
    with pytest.raises(ConfigError, match="arm CE trains on 512 tokens in 2 steps, its control control on 1,024 in 4"):
        run_study(command(tmp_path, dry_run=True), decode(StudyConfig, tree))


def test_a_dry_run_lists_cells_and_writes_nothing(
    tree: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run_study(command(tmp_path, dry_run=True), decode(StudyConfig, tree))
    # Seed 0: root, more x 2, stage1, s3 x 2, ce; seed 1: root, more, stage1, ce (the rate of s3 is known).
    assert "11 cells of 3 arms" in caplog.text
    assert "s3, seed 0, rate 1e+30" in caplog.text
    assert not command(tmp_path).folder.exists()


def test_a_step_that_counts_epochs_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["steps"]["s3"]["command"] = ["training=stage3_distill", "data=downstream", "data.task=recall"]
    with pytest.raises(ConfigError, match=r"steps\.s3 counts epochs; give training\.max_steps"):
        run_study(command(tmp_path, dry_run=True), decode(StudyConfig, tree))


def test_a_source_that_pretrains_again_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["steps"]["root"]["source"] = "base"
    with pytest.raises(ConfigError, match=r"steps\.root: source=base and training\.from_scratch=true do not fit"):
        run_study(command(tmp_path, dry_run=True), decode(StudyConfig, tree))
