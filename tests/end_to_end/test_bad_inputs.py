"""Ten mistakes at the door: one clear line, the documented exit code, and nothing lost."""

import json
import shutil
from pathlib import Path

import pytest

from wrinklefree.cli import train_main
from wrinklefree.models.artifact import read_artifact

SHORT = ["training.batch_size=4", "training.max_seq_length=64"]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one line of a command that must fail."""
    capsys.readouterr()
    code = train_main(list(arguments))
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return code, lines[0]


@pytest.fixture
def stage1(overrides: list[str], text: list[str], tmp_path: Path) -> Path:
    """A completed stage 1."""
    assert train_main([*overrides, "training=stage1_subln", *text, *SHORT, "subln.gain=ones"]) == 0
    return (tmp_path / "outputs" / "bitdistill_tiny_subln_insertion" / "stage1_checkpoint").resolve()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["training.max_seq_lenght=128"], "did you mean training.max_seq_length"),
        (["training.batch_size=many"], "training.batch_size"),
        (["model=smolm2_135m"], "did you mean smollm2_135m"),
    ],
    ids=["misspelt key", "wrong type", "unknown group option"],
)
def test_configuration_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    code, line = fails(capsys, "training=stage2_pretrain", *arguments)
    assert code == 2
    assert expected in line


def test_a_missing_file(capsys: pytest.CaptureFixture[str], overrides: list[str], tmp_path: Path) -> None:
    missing = tmp_path / "nothing.jsonl"
    source = f"data.sources=[{{kind: local, path: '{missing}'}}]"
    code, line = fails(capsys, *overrides, "training=fp_pretrain", "data=local", source, "training.max_steps=1")
    assert code == 65
    assert str(missing) in line


def test_an_empty_data_set(capsys: pytest.CaptureFixture[str], overrides: list[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    source = f"data.sources=[{{kind: local, path: '{empty}'}}]"
    code, line = fails(capsys, *overrides, "training=fp_pretrain", "data=local", source, "training.max_steps=1")
    assert code == 65
    assert str(empty) in line


def test_a_missing_column(capsys: pytest.CaptureFixture[str], overrides: list[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"body": "text", "title": "t"}) + "\n")
    source = f"data.sources=[{{kind: local, path: '{file}'}}]"
    code, line = fails(capsys, *overrides, "training=fp_pretrain", "data=local", source, "training.max_steps=1")
    assert code == 65
    assert "body" in line
    assert "title" in line


def test_a_truncated_checkpoint(
    capsys: pytest.CaptureFixture[str], overrides: list[str], text: list[str], stage1: Path
) -> None:
    weights = stage1 / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, line = fails(capsys, *overrides, "training=stage2_pretrain", *text, *SHORT, "training.max_steps=1")
    assert code == 78
    assert "model.safetensors" in line


def test_a_checkpoint_of_another_model(
    capsys: pytest.CaptureFixture[str], overrides: list[str], text: list[str], stage1: Path
) -> None:
    wider = "model.architecture.intermediate_size=96"
    code, line = fails(
        capsys, *overrides, "training=stage2_pretrain", *text, *SHORT, "training.max_steps=1", wider,
        f"training.init_from={stage1}",
    )  # fmt: skip
    assert code == 78
    assert "intermediate_size" in line
    assert read_artifact(stage1).lineage["stage"] == "stage1"


def test_no_network(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    code, line = fails(
        capsys, "model=smollm2_135m", "training=stage1_subln", f"output_dir={tmp_path / 'outputs'}",
    )  # fmt: skip
    assert code == 69
    assert "HuggingFaceTB/SmolLM2-135M" in line
    assert "model.source=p" in line


def test_an_unwritable_output(
    capsys: pytest.CaptureFixture[str], overrides: list[str], text: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    code, line = fails(
        capsys, *overrides, "training=stage1_subln", *text, *SHORT, f"output_dir={file / 'outputs'}"
    )  # fmt: skip
    assert code == 74
    assert str(file) in line
    assert file.read_text() == "kept"


def test_a_damaged_run_folder_is_rebuilt_not_trusted(
    overrides: list[str], text: list[str], stage1: Path, tmp_path: Path
) -> None:
    """A completed run whose artifact was damaged is not skipped: the same command makes it again."""
    shutil.rmtree(stage1)
    assert train_main([*overrides, "training=stage1_subln", *text, *SHORT, "subln.gain=ones"]) == 0
    assert read_artifact(stage1).lineage["stage"] == "stage1"
