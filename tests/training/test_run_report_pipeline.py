"""The page of a whole job: what it found, and what it did where it did not come to its end."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from wrinklefree.composition import compose
from wrinklefree.training.comparison import Interval
from wrinklefree.training.evaluation import LanguageScore, TaskScore
from wrinklefree.training.pipeline import PipelinePlan, plan_pipeline
from wrinklefree.training.report import Arm, ModelSize, Outcome, Report
from wrinklefree.training.run_report_pipeline import page_if_it_stops, render_pipeline_page, write_pipeline_page
from wrinklefree.training.trainer import Interrupted

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], list[PipelinePlan]]:
    """Configuration, its tree and the plans of two seeds; nothing of it has run."""
    overrides = ["model=tiny", "training=bitdistill", f"output_dir={tmp_path_factory.mktemp('job')}"]
    config, tree = compose(overrides)
    return config, dict(tree), [plan_pipeline(config, overrides, seed) for seed in (1, 2)]


def ran(plan: PipelinePlan, step: str, losses: list[float | None], **record: Any) -> None:
    folder = plan.steps[step].run_folder
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [
        {"event": "step", "step": at, "loss": loss} for at, loss in enumerate(losses, start=1)
    ]
    for at, bits in ((1, 2.0), (len(losses), 1.75)):
        scores = {"bits_per_byte": bits, "perplexity": 9.0, "broken": None}
        lines.append({"event": "evaluation", "step": at, "evaluation": scores})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "metadata.json").write_text(json.dumps({"status": "completed"} | record))


def arm(name: str, bits: float, accuracy: float) -> Arm:
    language = LanguageScore(bits, Interval(bits - 0.1, bits + 0.1), 1.0, 3.0, 100, (80.0 * bits,) * 9, (10,) * 9)
    hits = tuple(float(index < accuracy * 100) for index in range(100))
    task = TaskScore("recall", "accuracy", accuracy, Interval(0, 1), hits)
    return Arm(name, f"what {name} is", 123_456, language, task, ModelSize(1_500_000, 2_500_000))


def report_of(config: Any, plans: list[PipelinePlan]) -> Report:
    arms = (arm("full precision", 1.0, 0.9), arm("control", 1.0, 0.9), arm("naive ternary", 3.0, 0.1),
            arm("BitNet-SFT", 2.0, 0.5), arm("BitDistill", 1.25, 0.8))  # fmt: skip
    outcomes = [Outcome(plan.seed, arms, (("BitDistill", HOSTILE, f"{HOSTILE} & more"),)) for plan in plans]
    return Report(
        config, outcomes, {"stage2": 3600.0, "evaluation": 61.0}, 3661.0, {"final": Path("out/checkpoint-final")}
    )


def test_a_finished_job_shows_its_table_closure_curves_and_samples(
    job: tuple[Any, dict[str, Any], list[PipelinePlan]], tmp_path: Path
) -> None:
    config, tree, plans = job
    for plan in plans:
        ran(plan, "stage2", [3.0, 2.0 + plan.seed], tokens=4096, seconds=61, versions={"torch": "9.9"})
    path = write_pipeline_page(
        tmp_path / "new", tree, plans, status="completed", report=report_of(config, plans), problem="no engine"
    )
    assert path is not None
    assert path == tmp_path / "new" / "report.html"
    text = path.read_text(encoding="utf-8")
    plain = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    for words in (
        "tiny: from full precision to ternary completed",
        "seed 1, 2; 2 of 16 steps done",
        "no engine",
        "bits per byte 1.2500 (full precision 1.0000) recall accuracy 80.0% (full precision 90.0%)",
        "linear layers 1.50 MB (full precision 1.50) this command took 1:01:01 of it evaluation 1:01",
        "ternary model: out/checkpoint-final",
        "BitDistill what BitDistill is 123,456 1.2500",
        "80.0%",
        "gap closure on bits per byte, BitNet-SFT to control: 75%",
        "stage2: loss seed 1 3 seed 2 4",
        "stage2: validation bits_per_byte seed 1 1.75 seed 2 1.75",
        "1 stage2 stage2 completed 4,096 1:01 bits_per_byte 1.75 stage1",
        "2 stage3 stage3 not begun stage2, taught by fp_sft",
        "torch 9.9",
        "recall (stage3)",
    ):
        assert words in plain, words
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2
    assert "validation perplexity" not in text
    assert not re.search(r'(?:src|href)="(?!data:,")', text)


def test_a_job_that_stops_leaves_a_page_of_what_it_did(
    job: tuple[Any, dict[str, Any], list[PipelinePlan]], tmp_path: Path
) -> None:
    _, tree, plans = job
    ran(plans[0], "teacher", [2.0, None], seconds=30, tokens=10)
    with pytest.raises(Interrupted), page_if_it_stops(tmp_path / "a", tree, plans):
        raise Interrupted(15, 3)
    text = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert "the same command resumes it" in text
    assert "teacher: loss" in text
    with pytest.raises(ValueError, match="of the disk"), page_if_it_stops(tmp_path / "b", tree, plans):
        raise ValueError("the end of the disk")
    assert "ValueError: the end of the disk" in (tmp_path / "b" / "report.html").read_text(encoding="utf-8")
    with page_if_it_stops(tmp_path / "c", tree, plans):
        pass
    assert not (tmp_path / "c").exists()


def test_a_job_of_which_nothing_ran_has_a_page(job: tuple[Any, dict[str, Any], list[PipelinePlan]]) -> None:
    config, tree, _ = job
    overrides = ["model=tiny", "training=bitdistill", "output_dir=nowhere"]
    text = render_pipeline_page(tree, [plan_pipeline(config, overrides, 7)], status="failed")
    assert "0 of 8 steps done" in text
    assert text.count("not begun") == 8


def test_a_page_that_cannot_be_written_costs_a_warning(
    job: tuple[Any, dict[str, Any], list[PipelinePlan]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, tree, plans = job
    (tmp_path / "file").touch()
    assert write_pipeline_page(tmp_path / "file" / "folder", tree, plans, status="completed") is None
    assert "report.html was not written (NotADirectoryError" in caplog.text
