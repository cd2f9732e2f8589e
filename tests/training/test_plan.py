"""Length and identity of a run, before it runs."""

from pathlib import Path

import pytest

from wrinklefree.composition import compose
from wrinklefree.training.config import SftConfig, StageConfig
from wrinklefree.training.inputs import StageInput
from wrinklefree.training.plan import plan_stage, repository_root, steps_for
from wrinklefree.utils.errors import ConfigError

BASE = StageInput("base", "weights-a", None, "the pretrained model")
COMMAND = ["model=tiny", "training=stage2_pretrain", "data=packaged"]


def training(**keys: object) -> StageConfig:
    return SftConfig(stage="fp_sft", lr=1e-4, batch_size=4, max_seq_length=32, **keys)


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"total_tokens": 1280}, 10),
        ({"total_tokens": 1281}, 11),
        ({"total_tokens": 1281, "gradient_accumulation_steps": 2}, 6),
        ({"epochs": 3.0}, 15),
        ({"epochs": 0.5, "gradient_accumulation_steps": 2}, 2),
        ({"epochs": 3.0, "max_steps": 7}, 7),
    ],
)
def test_length(keys: dict[str, object], steps: int) -> None:
    assert steps_for(training(**keys), batches_per_epoch=5) == steps


def test_epochs_of_a_text_stream_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"give training\.total_tokens="):
        steps_for(training(epochs=1.0), batches_per_epoch=None)


def test_two_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.total_tokens=1280 and training\.epochs=1 both give a length"):
        steps_for(training(total_tokens=1280, epochs=1.0), batches_per_epoch=5)


def fingerprint(*overrides: str, source: str = "stage1-a") -> str:
    config, tree = compose([*COMMAND, *overrides])
    parent = StageInput("stage1", source, Path("artifact"), "given", (("stage1", source),))
    return plan_stage(config, tree, base=BASE, source=parent).fingerprint.value


def test_what_the_stage_reads_decides_its_identity() -> None:
    same = fingerprint()
    assert fingerprint() == same
    # Infrastructure, and sections that stage 2 never reads.
    for override in ("output_dir=elsewhere", "training.checkpoint.save_interval=7", "distillation.lambda_logits=3.0"):
        assert fingerprint(override) == same
    for override in ("training.lr=0.5", "seed=1", "data.held_out_percent=3.0", "optimizer.beta2=0.9"):
        assert fingerprint(override) != same


def test_another_stage_1_is_another_stage_2() -> None:
    assert fingerprint(source="stage1-b") != fingerprint(source="stage1-a")


def test_folders_and_pointer() -> None:
    config, tree = compose([*COMMAND, "output_dir=somewhere"])
    parent = StageInput("stage1", "s", Path("artifact"), "given", (("stage1", "s"),))
    plan = plan_stage(config, tree, base=BASE, source=parent)
    assert plan.pointer == Path("somewhere/bitdistill_tiny_continue_pretrain/stage2_checkpoint")
    assert plan.run_folder == Path("somewhere/bitdistill_tiny_continue_pretrain/runs") / plan.fingerprint.value[:8]
    assert plan.as_input("next").ancestors == (("stage1", "s"), ("stage2", plan.fingerprint.value))


def test_the_repository_is_this_checkout() -> None:
    root = repository_root()
    assert root is not None
    assert (root / "pyproject.toml").is_file()
