import pytest
import torch

from wrinklefree.composition import compose
from wrinklefree.training.pipeline import plan_pipeline, run_pipeline
from wrinklefree.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("step", "command", "message"),
    [
        ("stage3", "'training=stage3_distill','data=facts_and_text'", "training.steps.stage3 needs a task"),
        ("stage2", "'training=stage2_pretrain','data=recall'", "training.steps.stage2 needs text"),
    ],
)
def test_a_step_with_the_wrong_kind_of_data_is_refused_before_any_training(step, command, message) -> None:
    overrides = ["model=tiny", "training=bitdistill", f"training.steps.{step}=[{command}]"]
    config, _ = compose(overrides)
    with pytest.raises(ConfigError, match=message):
        plan_pipeline(config, overrides, seed=42)


def test_a_job_of_days_on_a_cpu_is_refused_before_its_first_step(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    step = "'training=stage2_pretrain','data=facts_and_text','training.total_tokens=10000000000000'"
    overrides = ["model=tiny", "training=bitdistill", f"training.steps.stage2=[{step}]", f"output_dir={tmp_path}"]
    config, tree = compose(overrides)
    with pytest.raises(ConfigError, match="the whole job would take about .* hours on this CPU"):
        run_pipeline(config, tree, overrides)
    assert not list(tmp_path.rglob("metadata.json"))
