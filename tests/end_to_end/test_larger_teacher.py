"""A teacher of another width and depth: it teaches logits and relations, and needs the student's tokenizer."""

import json
from pathlib import Path

import pytest
import torch

from wrinklefree.cli import train_main
from wrinklefree.models.artifact import read_artifact, write_artifact
from wrinklefree.models.llama import CausalLM
from wrinklefree.utils.tokenizer import train_tokenizer

SHORT = ["training.batch_size=4", "training.max_seq_length=64"]
STEPS = ["training.gradient_accumulation_steps=1", "training.max_steps=2", "training.evaluation.max_examples=0"]
LINEAGE = {"stage": "fp_sft", "fingerprint": "0" * 64, "ancestors": [["fp_sft", "0" * 64]], "tokens": 0}
TASK = ["data=downstream", "data.task=recall", "data.max_examples=20"]


@pytest.fixture
def larger(micro_model: Path, tmp_path: Path) -> Path:
    """Twice as wide and one block deeper than the student, with its tokenizer."""
    student = read_artifact(micro_model)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
    torch.manual_seed(1)
    model = CausalLM(student.architecture.model_copy(update=sizes))
    write_artifact(tmp_path / "larger", model, student.load_tokenizer(), LINEAGE)
    return tmp_path / "larger"


def test_a_larger_teacher_teaches(
    overrides: list[str], text: list[str], tmp_path: Path, larger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([*overrides, "training=stage1_subln", *text, *SHORT]) == 0
    # 2 key-value heads of 8 channels here, of 16 there: 16 and 32 channels in 8 relation heads.
    stage3 = [*overrides, "training=stage3_distill", *TASK, *SHORT, *STEPS, "distillation.attention.relation_heads=8"]
    assert train_main([*stage3, f"training.teacher.source={larger}"]) == 0
    [folder] = (tmp_path / "outputs" / "bitdistill_tiny_distillation" / "runs").iterdir()
    terms = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["terms"]
    assert terms["logits"] > 0
    assert terms["attention"] > 0
    artifact = read_artifact(folder / "artifact")
    assert artifact.architecture.hidden_size == 32
    assert [parent["stage"] for parent in artifact.lineage["parents"]] == ["stage1", "fp_sft"]

    capsys.readouterr()
    other = read_artifact(larger)
    words = train_tokenizer([" ".join(f"{n * n:05d} and {n:x}" for n in range(2000))], 320)
    architecture = other.architecture.model_copy(update={"vocab_size": 320})
    write_artifact(tmp_path / "foreign", CausalLM(architecture), words, LINEAGE | {"fingerprint": "1" * 64})
    assert train_main([*stage3, f"training.teacher.source={tmp_path / 'foreign'}"]) != 0
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "has another tokenizer than the student" in line
    assert "training.teacher.source=" in line
