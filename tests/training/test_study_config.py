"""Studies decode, name what they mean, and hold their controls to their arms."""

import subprocess
import sys
from typing import Any

import pytest

from wrinklefree.training.study_config import StudyCommand, StudyConfig, parse_study, split_keys, studies
from wrinklefree.utils.config import decode
from wrinklefree.utils.errors import ConfigError


def tree(**changes: Any) -> dict[str, Any]:
    """A small study: one root, two branches, the second taught by the first."""
    return {
        "name": "small",
        "question": "does it?",
        "steps": {
            "root": {"command": ["experiment=study_base"]},
            "control": {"command": ["training=fp_pretrain"], "source": "root", "rates": [1e-4, 1e-3]},
            "ternary": {"command": ["training=stage1_subln"], "source": "root"},
            "student": {"command": ["training=stage3_distill"], "source": "ternary", "teacher": "control"},
        },
        "arms": {
            "FP": {"step": "control", "meaning": "full precision"},
            "S3": {"step": "student", "meaning": "distilled", "control": "FP"},
        },
        "scoring": {"text": ["data=packaged"]},
        **changes,
    }


def study(**changes: Any) -> StudyConfig:
    return decode(StudyConfig, tree(**changes))


def test_an_arm_needs_its_chain_and_its_teacher_in_order() -> None:
    assert study().needed_steps(["S3"], tuning=True) == ["root", "ternary", "control", "student"]
    assert study().needed_steps(["FP"], tuning=True) == ["root", "control"]
    assert study().chain("student") == ["root", "ternary", "student"]


def test_a_borrowed_rate_is_found_with_the_first_seed_only() -> None:
    borrowing = tree()
    borrowing["steps"]["student"]["rate_of"] = "control"
    del borrowing["steps"]["student"]["teacher"]
    config = decode(StudyConfig, borrowing)
    assert config.needed_steps(["S3"], tuning=True) == ["root", "ternary", "control", "student"]
    assert config.needed_steps(["S3"], tuning=False) == ["root", "ternary", "student"]


def test_some_arms_run_with_the_first_seeds_only() -> None:
    few = tree(seeds=[3, 4, 5])
    few["arms"]["S3"]["first_seeds"] = 1
    config = decode(StudyConfig, few)
    assert config.seeds_of("S3") == (3,)
    assert config.seeds_of("FP") == (3, 4, 5)


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        (("steps", "student", "source"), "nothing", "steps.student.source=nothing is no step; known: root, control"),
        (("steps", "student", "teacher"), "nobody", "steps.student.teacher=nobody is no step"),
        (("steps", "root", "source"), "student", "steps.root is its own source: root <- student <- ternary <- root"),
        (("steps", "student", "rate_of"), "ternary", "rate_of=ternary names no step with rates"),
        (("arms", "S3", "step"), "gone", "arms.S3.step=gone is no step"),
        (("arms", "S3", "control"), "gone", "arms.S3.control=gone is no arm; known: FP, S3"),
        (("baseline",), "BitNet-SFT", "BitNet-SFT is no arm"),
        (("comparisons",), [{"claim": "c", "better": "S3", "than": "S4"}], "S4 is no arm"),
    ],
)
def test_names_that_lead_nowhere_are_refused(where: tuple[str, ...], change: object, message: str) -> None:
    broken = tree()
    node = broken
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = change
    with pytest.raises(ConfigError) as error:
        decode(StudyConfig, broken)
    assert message in str(error.value)


def test_no_step_may_take_the_name_of_the_pretrained_model() -> None:
    steps = {"base": {"command": ["experiment=study_base"]}}
    with pytest.raises(ConfigError, match="steps.base: this name means the command's own pretrained model"):
        decode(StudyConfig, tree(steps=steps, arms={"FP": {"step": "base", "meaning": "m"}}))


def test_keys_are_parted_and_values_read() -> None:
    own, others = split_keys(
        ["study=x", "threads=2", "arms=S3", "seeds=[1,2]", "report=true", "output_dir=1e3"], StudyCommand
    )
    assert own == {"study": "x", "threads": 2, "arms": ["S3"], "report": True, "output_dir": "1e3"}
    assert others == ["seeds=[1,2]"]


@pytest.mark.parametrize("argument", ["threads", "--threads=1"])
def test_what_is_no_override_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match="is not an override"):
        split_keys([argument], StudyCommand)


def test_an_unknown_study_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"study: expected one of .*ablation_text.*, given 'ablaton'"):
        parse_study(["study=ablaton"])


def test_an_unknown_arm_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"study ablation_text has no arm 'S9'; it has full precision"):
        parse_study(["study=ablation_text", "arms=[S9]"])


def test_the_command_line_overrides_the_study() -> None:
    command, config = parse_study(["study=ablation_text", "seeds=[7]", "steps.stage2.rates=[0.5]", "threads=1"])
    assert config.seeds == (7,)
    assert config.steps["stage2"].rates == (0.5,)
    assert command.threads == 1


def test_mistakes_are_answered_without_loading_torch() -> None:
    code = (
        "import sys, wrinklefree.training.study_config, wrinklefree.training.evaluation_config; "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", studies())
def test_every_study_decodes_and_every_ternary_arm_has_its_control(name: str) -> None:
    config = parse_study([f"study={name}"])[1]
    assert config.name == name
    for arm_name, arm in config.arms.items():
        chain = [config.steps[step].command for step in config.chain(arm.step)]
        ternary = any("training=stage1_subln" in command for command in chain)
        trained = not config.steps[arm.step].command[0].startswith("training=stage1")
        assert (arm.control is not None) == (ternary and trained), arm_name
