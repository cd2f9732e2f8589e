"""The stacked recipe and the paper's settings: as experiments they are what the studies compare."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from wrinklefree.cli import train_main
from wrinklefree.composition import compose, compose_step
from wrinklefree.training.config import PipelineConfig, RunConfig, Stage2Config, StageConfig
from wrinklefree.training.pipeline import OPTIONAL_STEPS
from wrinklefree.training.plan import steps_for
from wrinklefree.training.study_config import parse_study

STUDIES = ("best_text", "best_recall", "best_headline")
STEPS = ("stage1", "stage2", "stage3")


def step_of(experiment: str, step: str) -> RunConfig:
    command = [f"experiment={experiment}"]
    pipeline = compose(command).config.training
    assert isinstance(pipeline, PipelineConfig)
    return compose_step(pipeline.steps[step], command).config


def without_data(command: Sequence[str]) -> list[str]:
    of_the_bed = ("data", "training.max_steps=", "training.evaluation.")
    return [override for override in command if not override.startswith(of_the_bed)]


def recipe(config: RunConfig) -> object:
    """What makes a recipe, apart from lengths, rates and data."""
    training = config.training
    parts: list[object] = [training.stage]
    if training.stage == "stage1":
        parts += [config.subln.placement, config.subln.gain, config.subln.warmup, config.model.quantization]
    if isinstance(training, StageConfig):
        parts += [training.quantization_warmup.schedule, training.schedule, config.optimizer.weight_decay]
    if isinstance(training, Stage2Config):
        parts += [training.logits if training.logits.weight else None]
    if training.stage == "stage3":
        shared = config.distillation.model_dump(exclude={"name", "attention"})
        parts += [shared, config.distillation.attention.form, config.distillation.attention.layer]
    return parts


@pytest.mark.parametrize(("experiment", "prefix"), [("best", "best"), ("paper_recipe", "paper")])
def test_the_studies_train_what_the_experiment_says(experiment: str, prefix: str) -> None:
    first, *others = (parse_study([f"study={study}"])[1].steps for study in STUDIES)
    for step in STEPS:
        studied: Sequence[str] = first[f"{prefix}_{step}"].command
        assert recipe(compose(studied).config) == recipe(step_of(experiment, step)), step
        for other in others:
            # Stage 3 runs on the task of its bed; what else it is told is the same.
            mine, theirs = (without_data(steps[f"{prefix}_{step}"].command) for steps in (first, other))
            assert mine == theirs


def test_the_recipes_differ_as_they_say() -> None:
    best, paper = ([recipe(step_of(name, step)) for step in STEPS] for name in ("best", "paper_recipe"))
    assert all(mine != theirs for mine, theirs in zip(best, paper, strict=True))
    stage2 = step_of("best", "stage2").training
    assert isinstance(stage2, Stage2Config)
    assert stage2.logits.weight == 10.0
    assert step_of("paper_recipe", "stage3").distillation.gamma_attention == "published"


@pytest.mark.parametrize("experiment", ["best", "paper_recipe"])
def test_the_control_gets_the_tokens_of_stage_2(experiment: str) -> None:
    pipeline = compose([f"experiment={experiment}"]).config.training
    assert isinstance(pipeline, PipelineConfig)
    assert all(pipeline.steps[name] == () for name in OPTIONAL_STEPS)
    lengths = []
    for step in ("stage2", "control_pretrain"):
        training = step_of(experiment, step).training
        assert isinstance(training, StageConfig)
        lengths.append(steps_for(training, None) * training.batch_size * training.max_seq_length)
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("experiment", ["best", "paper_recipe"])
def test_a_recipe_plans(experiment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert train_main([f"experiment={experiment}", "dry_run=true", f"output_dir={tmp_path}"]) == 0
    assert "-- step stage3" in caplog.text
    assert "-- step stage1_9" not in caplog.text


@pytest.mark.parametrize(
    ("experiment", "command"),
    [
        ("smollm2_stage2", "model=smollm2_135m training=stage2_pretrain data=fineweb distributed=single_gpu"),
        (
            "smollm2_stage3",
            "model=smollm2_135m training=stage3_distill_smollm2 data=downstream distillation=classification "
            "distributed=single_gpu",
        ),
        ("qwen3_4b_stage2", "model=qwen3_4b training=stage2_pretrain data=fineweb distributed=fsdp_multi"),
        (
            "qwen3_4b_stage3",
            "model=qwen3_4b training=stage3_distill data=downstream distillation=classification distributed=fsdp_multi",
        ),
        ("llama_7b_stage3", "model=llama_7b training=stage3_distill distributed=fsdp_large"),
    ],
)
def test_an_experiment_is_the_readmes_command(experiment: str, command: str) -> None:
    assert compose([f"experiment={experiment}"]).config == compose(command.split()).config
