"""A stage's input follows lineage, never time."""

import json
from pathlib import Path

import pytest

from wrinklefree.training.inputs import StageInput, find_input, find_task_teacher, stage_pointer
from wrinklefree.training.stages import STAGES
from wrinklefree.utils.errors import CheckpointError, ConfigError

BASE = StageInput("base", "base-weights", None, "the pretrained model")


def write(output_dir: Path, stage: str, fingerprint: str, ancestors: list[list[str]], *, task: str = "sst2") -> Path:
    """An artifact's lineage and the stage's pointer to it, as a completed run leaves them."""
    row = STAGES[stage]
    artifact = output_dir / row.folder_name("m") / "runs" / fingerprint / "artifact"
    artifact.mkdir(parents=True)
    lineage = {
        "stage": stage,
        "fingerprint": fingerprint,
        "ancestors": [*ancestors, [stage, fingerprint]],
        "data": {"name": task},
        "base": {"fingerprint": "base-weights"},
        "parents": [{"role": "init", "stage": ancestors[-1][0] if ancestors else "base"}],
    }
    (artifact / "lineage.json").write_text(json.dumps(lineage))
    pointer = stage_pointer(output_dir, "m", row)
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(artifact)
    return artifact


def find(stage: str, output_dir: Path, init_from: str | None = None) -> StageInput:
    return find_input(STAGES[stage], model_name="m", output_dir=output_dir, init_from=init_from, base=BASE)


def test_full_precision_stages_and_stage_1_start_from_the_base(tmp_path: Path) -> None:
    for stage in ("stage1", "fp_sft", "fp_pretrain"):
        assert find(stage, tmp_path) is BASE


def test_the_furthest_earlier_stage_of_the_current_chain_is_taken(tmp_path: Path) -> None:
    one = write(tmp_path, "stage1", "aaaa", [])
    assert find("stage2", tmp_path).path == one
    aligned = write(tmp_path, "stage1_9", "bbbb", [["stage1", "aaaa"]])
    assert find("stage2", tmp_path).path == aligned
    assert find("stage3", tmp_path).path == aligned
    pretrained = write(tmp_path, "stage2", "cccc", [["stage1", "aaaa"], ["stage1_9", "bbbb"]])
    assert find("stage3", tmp_path).path == pretrained
    assert find("stage3", tmp_path).ancestors[-1] == ("stage2", "cccc")
    assert find("bitnet_sft", tmp_path).path == one


def test_a_stale_chain_is_an_error_that_names_both(tmp_path: Path) -> None:
    write(tmp_path, "stage1", "aaaa", [])
    write(tmp_path, "stage1_9", "bbbb", [["stage1", "aaaa"]])
    write(tmp_path, "stage1", "dddd", [])
    with pytest.raises(CheckpointError, match=r"stale chain.*bbbb.*aaaa.*dddd") as error:
        find("stage2", tmp_path)
    assert "training.init_from=" in str(error.value)


def test_without_stage_1_the_error_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Run training=stage1_subln model=m first"):
        find("stage2", tmp_path)


def test_a_given_input_is_taken_from_an_artifact_or_a_stage_folder(tmp_path: Path) -> None:
    one = write(tmp_path, "stage1", "aaaa", [])
    assert find("stage2", tmp_path / "elsewhere", str(one)).path == one
    assert find("stage2", tmp_path / "elsewhere", str(one.parents[2])).path == one


def test_a_given_input_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    tuned = write(tmp_path, "fp_sft", "eeee", [])
    with pytest.raises(ConfigError, match="starts from a ternary model"):
        find("stage2", tmp_path, str(tuned))
    one = write(tmp_path, "stage1", "aaaa", [])
    with pytest.raises(ConfigError, match="starts from a full-precision model"):
        find("fp_sft", tmp_path, str(one))


def test_a_missing_or_foreign_given_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        find("stage2", tmp_path, str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="neither an artifact"):
        find("stage2", tmp_path, str(tmp_path))


def test_damaged_lineage_is_named(tmp_path: Path) -> None:
    one = write(tmp_path, "stage1", "aaaa", [])
    (one / "lineage.json").write_text('{"stage": ')
    with pytest.raises(CheckpointError, match=r"lineage\.json is not valid JSON"):
        find("stage2", tmp_path)


def teacher(output_dir: Path, source: str = "auto", task: str = "sst2") -> StageInput:
    return find_task_teacher(source=source, model_name="m", output_dir=output_dir, task=task, base=BASE)


def test_the_teacher_is_the_model_tuned_on_this_task(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned = write(tmp_path, "fp_sft", "eeee", [])
    write(tmp_path, "fp_sft", "ffff", [], task="mnli")
    assert teacher(tmp_path).path == tuned
    assert teacher(tmp_path, "base") is BASE
    assert not caplog.records
    assert teacher(tmp_path, task="boolq") is BASE
    assert "the base model teaches" in caplog.text


def test_two_equally_good_teachers_are_not_guessed_between(tmp_path: Path) -> None:
    write(tmp_path, "fp_sft", "eeee", [])
    write(tmp_path, "fp_sft", "ffff", [])
    newest = write(tmp_path, "fp_sft", "9999", [], task="mnli")
    with pytest.raises(ConfigError, match="2 fp_sft artifacts fit task sst2"):
        teacher(tmp_path)
    assert teacher(tmp_path, str(newest)).path == newest
