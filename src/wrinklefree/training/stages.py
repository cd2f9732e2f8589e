"""The table of stages, by name."""

from types import MappingProxyType

from wrinklefree.training import pretrain, sft, stage1, stage1_9, stage2, stage3
from wrinklefree.training.config import RunConfig, Stage2Config
from wrinklefree.training.stage import TeacherKind

STAGES = MappingProxyType(
    {
        row.name: row
        for row in (
            stage1.STAGE,
            stage1_9.STAGE,
            stage2.STAGE,
            stage3.STAGE,
            pretrain.STAGE,
            sft.FP_SFT,
            sft.BITNET_SFT,
        )
    }
)
"""`training.stage` -> stage."""


def teacher_kind(config: RunConfig) -> TeacherKind:
    """Who teaches the stage of this command: its row's teacher, and the pretrained model where stage 2 asks for one."""
    training = config.training
    if isinstance(training, Stage2Config) and training.logits.weight > 0:
        return "base"
    return STAGES[training.stage].teacher
