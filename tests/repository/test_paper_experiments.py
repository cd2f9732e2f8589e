"""The paper's cells: every one composes step by step, plans without a network, and states the hours that its tokens take."""

import logging
import re
from pathlib import Path

import pytest

from wrinklefree.cli import train_main
from wrinklefree.composition import compose, compose_step, config_directory
from wrinklefree.data.config import FinetuneData
from wrinklefree.training.config import PipelineConfig, StageConfig
from wrinklefree.training.device import count_parameters, reference_gpu_hours
from wrinklefree.training.plan import plan_stage, steps_for
from wrinklefree.utils.errors import NetworkError

CELLS = sorted(path.stem for path in (config_directory() / "experiment" / "paper").glob("*.yaml"))
TASKS = {"mnli": "classification", "qnli": "classification", "sst2": "classification", "cnn_dailymail": "summarization"}


def stated_hours(cell: str) -> int:
    """What the file says about itself."""
    text = (config_directory() / "experiment" / "paper" / f"{cell}.yaml").read_text()
    found = re.search(r"About (\d+) GPU hours", text)
    assert found is not None
    return int(found[1])


def test_every_cell_of_both_tables_is_there() -> None:
    models = ("qwen3_0_6b", "qwen3_1_7b", "qwen3_4b")
    assert sorted(f"{model}_{task}" for model in models for task in TASKS) == CELLS


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_composes_with_the_papers_settings_and_states_its_hours(cell: str) -> None:
    experiment = [f"experiment=paper/{cell}"]
    config = compose(experiment).config
    assert isinstance(config.training, PipelineConfig)
    model, task = next((cell.removesuffix(f"_{t}"), t) for t in TASKS if cell.endswith(f"_{t}"))
    assert config.model.name == model
    assert config.distillation.name == TASKS[task]
    assert config.distillation.gamma_attention == "published"
    parameters, hours = count_parameters(config.model.architecture), 0.0
    for name, command in config.training.steps.items():
        if not command:
            assert name == "stage1_9", "the paper has no such stage"
            continue
        step = compose_step(command, experiment).config
        if name == "stage1":
            continue
        assert isinstance(step.training, StageConfig)
        assert step.training.max_seq_length == 512
        steps = steps_for(step.training, None)
        tokens = steps * step.training.batch_size * step.training.gradient_accumulation_steps * 512
        hours += reference_gpu_hours(parameters, tokens, with_teacher=name == "stage3")
        if isinstance(step.data, FinetuneData):
            assert step.data.task == task
        else:
            assert step.data.name == "falcon"
            assert 10_000_000_000 <= tokens < 10_000_100_000
    assert stated_hours(cell) == pytest.approx(hours, abs=1)


FIRST = "qwen3_0_6b_sst2"


@pytest.mark.parametrize("cell", [FIRST, *(pytest.param(c, marks=pytest.mark.slow) for c in CELLS if c != FIRST)])
def test_a_cell_plans_without_a_network(cell: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    command = [f"experiment=paper/{cell}", "dry_run=true", f"output_dir={tmp_path}"]
    assert train_main(command) == 0
    assert re.search(r"dry run: fingerprints and folders are provisional, as Qwen/Qwen3-\S+ is not in", caplog.text)
    assert "-- step stage1_9" not in caplog.text
    assert "-- step stage2" in caplog.text
    assert "the pipeline's stage1)" in caplog.text, "without stage 1.9, stage 2 starts from stage 1"
    printed = re.search(r"all steps: about ([\d,]+\.\d) GPU hours a seed", caplog.text)
    assert printed is not None
    assert float(printed[1].replace(",", "")) == pytest.approx(stated_hours(cell), abs=1)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_dry_needs_the_model(tmp_path: Path) -> None:
    composed = compose(["model=qwen3_0_6b", "training=fp_pretrain", "data=packaged", f"output_dir={tmp_path}"])
    with pytest.raises(NetworkError, match="Qwen3-0.6B-Base is not in the local cache"):
        plan_stage(*composed)
