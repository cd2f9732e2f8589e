"""The stages of BitDistill as a table: what each reads and writes. The trainer never asks which one runs."""

from dataclasses import dataclass
from typing import Literal

TeacherKind = Literal["none", "base", "task"]


@dataclass(frozen=True)
class Stage:
    """One row of the table."""

    name: str
    title: str
    folder: str
    """Suffix of the stage's folder below `output_dir`."""
    pointer: str
    """Symlink in that folder to the newest completed artifact."""
    reads: tuple[str, ...]
    """Stages whose artifact it takes, the furthest first; empty: the pretrained model."""
    ternary: bool
    """Whether the model that it trains has BitLinear layers."""
    trains: bool
    teacher: TeacherKind
    sections: tuple[str, ...]
    """Root keys of the configuration that decide its result: the part that the fingerprint covers."""

    def folder_name(self, model_name: str) -> str:
        """The seed's folder name for this stage and model."""
        return f"bitdistill_{model_name}_{self.folder}"


_TRAINING_SECTIONS = ("model", "training", "data", "optimizer", "packing", "seed")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "stage1",
            "stage 1: SubLN insertion",
            "subln_insertion",
            "stage1_checkpoint",
            reads=(),
            ternary=True,
            trains=False,
            teacher="none",
            sections=("model", "training", "data", "subln", "seed"),
        ),
        Stage(
            "stage1_9",
            "stage 1.9: layer-wise distillation",
            "layerwise_distillation",
            "stage1_9_checkpoint",
            reads=("stage1",),
            ternary=True,
            trains=True,
            teacher="base",
            sections=(*_TRAINING_SECTIONS, "layerwise"),
        ),
        Stage(
            "stage2",
            "stage 2: continued pretraining",
            "continue_pretrain",
            "stage2_checkpoint",
            reads=("stage1_9", "stage1"),
            ternary=True,
            trains=True,
            teacher="none",
            sections=(*_TRAINING_SECTIONS, "influence"),
        ),
        Stage(
            "stage3",
            "stage 3: distillation fine-tuning",
            "distillation",
            "stage3_checkpoint",
            reads=("stage2", "stage1_9", "stage1"),
            ternary=True,
            trains=True,
            teacher="task",
            sections=(*_TRAINING_SECTIONS, "influence", "distillation"),
        ),
        Stage(
            "fp_pretrain",
            "full-precision pretraining",
            "fp_pretrain",
            "checkpoint",
            reads=(),
            ternary=False,
            trains=True,
            teacher="none",
            sections=_TRAINING_SECTIONS,
        ),
        Stage(
            "fp_sft",
            "full-precision fine-tuning",
            "fp_sft",
            "checkpoint",
            reads=(),
            ternary=False,
            trains=True,
            teacher="none",
            sections=_TRAINING_SECTIONS,
        ),
        Stage(
            "bitnet_sft",
            "BitNet-SFT: ternary fine-tuning without stages 1.9, 2 and distillation",
            "bitnet_sft",
            "checkpoint",
            reads=("stage1",),
            ternary=True,
            trains=True,
            teacher="none",
            sections=_TRAINING_SECTIONS,
        ),
    )
}
